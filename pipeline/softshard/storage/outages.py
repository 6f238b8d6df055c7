"""Tells an outage from bad data, by what a library raised while it read a source or asked a hub.

Every library has classes of its own for a server that is away, and wraps them: fsspec turns a refused connection into
FileNotFoundError, `datasets` a timeout into ConnectionError. So the whole chain of causes is looked at. A reason is
made of an HTTP status or the name of a class alone, because a library's message may quote what a request contained.
"""

from __future__ import annotations

import errno
import http.client
import socket
import ssl
import sys
from collections.abc import Iterator

from softshard.errors import SourceUnavailable, SourceUnreadable
from softshard.telemetry.redaction import without_credentials

__all__ = ["InputChanged", "find_outage", "is_missing", "network_errors", "source_failure"]

_STATUSES = {408, 425, 429}
"""HTTP statuses, beside those from 500 on, after which a retry may succeed."""
_LASTING_STATUSES = {501, 505}
_ERRNOS = {
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENETRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ETIMEDOUT,
    errno.ESTALE,
}
_BASES = {
    "aiohttp": "ClientError",
    "azure.core.exceptions": "AzureError",
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "httpx": "HTTPError",
    "httpx2": "HTTPError",
    "requests": "RequestException",
    "urllib3.exceptions": "HTTPError",
}
"""Base class of what a library of HTTP raises, by module."""
_AWAY = {
    ("aiohttp", "ClientConnectionError"),
    ("aiohttp", "ClientPayloadError"),
    ("azure", "ServiceRequestError"),
    ("azure", "ServiceResponseError"),
    ("google", "TransportError"),
    ("httpx", "TransportError"),
    ("httpx2", "TransportError"),
    ("huggingface_hub", "OfflineModeIsEnabled"),
    ("requests", "ChunkedEncodingError"),
    ("requests", "ConnectionError"),
    ("requests", "Timeout"),
    ("urllib3", "ProtocolError"),
    ("urllib3", "TimeoutError"),
}
"""Package and class of what they raise when a server is away."""


class InputChanged(OSError):
    """A file changed while it was read; the message says so, without an address."""


def network_errors(*others: type[BaseException]) -> tuple[type[BaseException], ...]:
    """For an `except`: other errors, and what the HTTP libraries that are loaded raise, mostly no OSError."""
    loaded = ((sys.modules.get(module), name) for module, name in _BASES.items())
    return (
        *others,
        *(getattr(module, name) for module, name in loaded if module is not None and hasattr(module, name)),
    )


def find_outage(error: BaseException) -> str | None:
    """Why a server or file system cannot be used for now, from an error's chain of causes; None: a retry is no use."""
    chain = list(_causes(error))
    if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain):
        return None
    # The innermost says most: a refused connection, for one, where the outermost says that a file is not cached.
    return next((reason for cause in reversed(chain) if (reason := _reason(cause)) is not None), None)


def is_missing(error: BaseException) -> bool:
    """Whether an error, or one of its causes, says that there is no such file."""
    return any(isinstance(cause, FileNotFoundError) or _status(cause) in {404, 410} for cause in _causes(error))


def source_failure(
    error: BaseException, *, source: str, uri: str, problem: str = "cannot be read"
) -> SourceUnavailable | SourceUnreadable:
    """The error to raise for what a library raised about a source: SourceUnavailable for an outage."""
    reason = find_outage(error)
    if reason is not None:
        return SourceUnavailable(source=source, uri=uri, reason=reason)
    said = without_credentials(str(error)) or type(error).__name__
    return SourceUnreadable(source=source, uri=uri, problem=f"{problem}: {said}")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _reason(error: BaseException) -> str | None:
    if isinstance(error, InputChanged):
        return str(error)
    status = _status(error)
    if status is not None:
        is_away = status in _STATUSES or (status >= 500 and status not in _LASTING_STATUSES)
        return f"HTTP {status}" if is_away else None
    kinds = {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}
    if kinds & _AWAY or isinstance(error, ConnectionError | TimeoutError | http.client.IncompleteRead):
        return type(error).__name__
    # Without a network, no name of a server is known.
    if isinstance(error, socket.gaierror) or (isinstance(error, OSError) and error.errno in _ERRNOS):
        return error.strerror or type(error).__name__
    return None


def _status(error: BaseException) -> int | None:
    """HTTP status of an error: of its response, or as aiohttp, azure and gcsfs have it."""
    places = (getattr(error, "response", None), error)
    found = (getattr(place, name, None) for place in places for name in ("status_code", "status", "code"))
    return next((value for value in found if isinstance(value, int) and 400 <= value < 600), None)
