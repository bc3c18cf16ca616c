"""What a site's file says to a kind of storage: the table `[storage.<scheme>]`."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError

from loadmaster.description import complaints
from loadmaster.errors import InvalidSite
from loadmaster.storage.base import StorageOptions


class Words(BaseModel):
    """What a site may say of one kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, options: StorageOptions) -> Self:
        """The words of a site. Raises `InvalidSite` that names each that is not understood."""
        try:
            return cls.model_validate(dict(options.words))
        except ValidationError as exc:
            raise InvalidSite("; ".join(f"[storage.{options.scheme}] {line}" for line in complaints(exc))) from None


class AmazonKeys(Words):
    """Where buckets of S3 and its like are, and who asks: the same words whichever library carries the requests."""

    region: str | None = None
    path_style: bool | None = None
    """Whether the bucket is in the path and not in the host's name; the default is yes for an endpoint of one's own."""
    access_key: SecretStr | None = None
    secret_key: SecretStr | None = None
    session_token: SecretStr | None = None
    profile: str | None = None
    credentials_file: Path | None = None
    anonymous: bool = False
