"""What can go wrong between us and a DiracX server. No message has a token in it, or what comes after a URL's path."""

from __future__ import annotations

from loadmaster.errors import LoadmasterError


class DiracxError(LoadmasterError):
    """A request was not done. `retryable`: the same one may be later."""

    retryable = False


class DiracxUnavailable(DiracxError):
    """The server could not be asked, did not answer in time, or is in trouble.

    `answered`: it did answer, so that it may be this one request that troubles it; else it may have done what it was asked,
    and only the answer was lost. `retry_after`: seconds, when it said so.
    """

    retryable = True

    def __init__(self, message: str, *, answered: bool = False, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.answered, self.retry_after = answered, retry_after


class DiracxRefused(DiracxError):
    """The server understood and will not: `status` is HTTP's (4xx), `detail` what it said besides."""

    def __init__(self, message: str, *, status: int, detail: str = "") -> None:
        super().__init__(message)
        self.status, self.detail = status, detail


class CredentialsRefused(DiracxError):
    """We have no credentials the server takes. Whoever renews the file helps: so it is worth another try, later."""

    retryable = True
