"""What the descriptions of jobs and of computing elements share: two spellings, and errors in the one that was used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)

from loadmaster.errors import InvalidJob
from loadmaster.wording import complaints, field_names


class Words(BaseModel):
    """What all descriptions share: frozen, two spellings, unknown capitalised keys kept in `extra`."""

    # Not built here, nor the parts of a description below: it is built with all of them, once.
    model_config = ConfigDict(
        defer_build=True, frozen=True, extra="forbid", coerce_numbers_to_str=True, str_strip_whitespace=False,
        allow_inf_nan=False,
    )  # fmt: skip

    extra: dict[str, JsonValue] = Field(default_factory=dict)
    """DIRAC's keys that have no field here, as they came."""

    what: ClassVar[str] = "description"
    """What it is called where it cannot be understood."""

    @classmethod
    def _keys(cls) -> Mapping[str, str]:
        return {}

    @model_validator(mode="wrap")
    @classmethod
    def _in_our_words(cls, data: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        """Made from keywords or from a dictionary, it is refused with the same error."""
        try:
            return build(data)
        except ValidationError as exc:
            raise InvalidJob(f"{cls.what}: {'; '.join(complaints(exc, data, cls._keys(), field_names(cls)))}") from exc

    @classmethod
    def load(cls, data: Mapping[str, Any]) -> Self:
        """The description in a dictionary, ours or DIRAC's. Raises `InvalidJob` that names every field at fault."""
        return cls.model_validate(data)

    @model_validator(mode="before")
    @classmethod
    def _spellings(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        ours = {dirac: field for field, dirac in cls._keys().items()}
        fields: dict[str, Any] = {}
        extra = data.get("extra") or {}
        if not isinstance(extra, Mapping):
            raise ValueError("extra: is not a dictionary")  # noqa: TRY004 - what pydantic collects
        extra = dict(extra)
        for key, value in data.items():
            if key == "extra":
                continue
            field = ours.get(str(key), str(key))
            if field in fields:
                raise ValueError(f"{field} and {cls._keys().get(field)} are the same field, given twice")
            if field in cls.model_fields:
                fields[field] = value
            elif str(key)[:1].isupper():
                extra[str(key)] = value
            else:
                fields[field] = value  # refused below, by name
        if hidden := next((key for key in extra if key in ours), None):
            raise ValueError(f"extra.{hidden}: has a field of its own, {ours[hidden]}")
        return {**fields, "extra": extra}

    def to_dirac(self) -> dict[str, Any]:
        """The same in DIRAC's keys, unknown ones included: what was given, also where it is what it would be otherwise."""
        values = self.model_dump(exclude={"extra"}, exclude_unset=True, exclude_none=True, mode="json")
        return {**self.extra, **{dirac: values[field] for field, dirac in self._keys().items() if field in values}}
