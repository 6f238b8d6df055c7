"""Classifies failed requests to an object store, without quoting what the request contained.

An exception of botocore, aiohttp or the system becomes a kind that callers act on, and a reason made only of the
store's error code, the HTTP status or the exception's class. The libraries' own messages may quote headers and
addresses, and with them credentials, so they are dropped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Failure", "classify_failure"]

Kind = Literal["missing", "condition_failed", "transient", "full", "unsupported", "refused"]

_KIND_BY_CODE: dict[str, Kind] = {
    "NoSuchKey": "missing",
    "PreconditionFailed": "condition_failed",
    # The bytes arrived damaged or incomplete.
    "BadDigest": "transient",
    "IncompleteBody": "transient",
    "XAmzContentSHA256Mismatch": "transient",
    # Another request to the same object was still running.
    "ConditionalRequestConflict": "transient",
    "OperationAborted": "transient",
    "NoSuchUpload": "transient",
    "RequestTimeout": "transient",
    "SlowDown": "transient",
    "Throttling": "transient",
    "ThrottlingException": "transient",
    "RequestLimitExceeded": "transient",
    # The machine's role renews credentials, and time services correct clocks.
    "ExpiredToken": "transient",
    "RequestTimeTooSkewed": "transient",
    "QuotaExceeded": "full",
    "QuotaExceededException": "full",
    "XMinioStorageFull": "full",
    "NotImplemented": "unsupported",
}
_KIND_BY_STATUS: dict[int, Kind] = {
    404: "missing",
    409: "transient",
    412: "condition_failed",
    429: "transient",
    501: "unsupported",
    507: "full",
}
_REMEDIES = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "check the credentials in the environment, and the bucket's policy",
    "InvalidAccessKeyId": "check AWS_ACCESS_KEY_ID",
    "SignatureDoesNotMatch": "check AWS_SECRET_ACCESS_KEY",
    "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, or give this machine a role",
    "PartialCredentialsError": "set both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "ProfileNotFound": "check AWS_PROFILE",
    "PermanentRedirect": "set AWS_REGION to the bucket's",
    "AuthorizationHeaderMalformed": "set AWS_REGION to the bucket's",
    "SSLError": "check the server's certificate, and AWS_CA_BUNDLE",
    "ClientConnectorCertificateError": "check the server's certificate, and AWS_CA_BUNDLE",
    "ValueError": "check AWS_ENDPOINT_URL and the credentials in the environment",
    "InvalidRegionError": "check AWS_REGION",
}


@dataclass(frozen=True, slots=True)
class Failure:
    """A failed request.

    Kinds: `missing`: there is no such object; `condition_failed`: a condition of the request did not hold; `transient`:
    a retry may succeed; `full`: no space is left; `unsupported`: the server cannot do it; `refused`: a retry is no use.
    """

    kind: Kind
    reason: str


def classify_failure(error: BaseException) -> Failure:
    """Classify an exception that a request raised."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return _classify_response(response)
    # botocore wraps what aiohttp and Python raise, and its own general class says nothing.
    inner = getattr(error, "kwargs", {}).get("error")
    if isinstance(inner, ValueError) or type(error).__name__ == "HTTPClientError":
        error = inner if isinstance(inner, BaseException) else error
    name = type(error).__name__
    return Failure(kind="transient" if _is_transient(error) else "refused", reason=_with_remedy(name))


def _classify_response(response: dict[str, Any]) -> Failure:
    code = re.sub("[^A-Za-z0-9]", "", str(response.get("Error", {}).get("Code", "")))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    kind = _KIND_BY_CODE.get(code) or ("refused" if code == "NoSuchBucket" else _KIND_BY_STATUS.get(status))
    if kind is None:
        kind = "transient" if status >= 500 else "refused"
    reason = code if code and code != str(status) else f"HTTP {status}"
    return Failure(kind=kind, reason=_with_remedy(reason))


def _is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed of a request that got no complete answer."""
    import ssl

    from aiohttp import ClientConnectorCertificateError, ClientError, ClientSSLError
    from botocore.exceptions import (
        EndpointConnectionError,
        FlexibleChecksumError,
        HTTPClientError,
        ResponseStreamingError,
        SSLError,
    )
    from botocore.parsers import ResponseParserError

    of_certificates = (SSLError, ClientSSLError, ClientConnectorCertificateError, ssl.SSLCertVerificationError)
    if isinstance(error, (*of_certificates, FileNotFoundError, PermissionError)):
        return False
    answers = (HTTPClientError, EndpointConnectionError, ResponseStreamingError, ResponseParserError)
    return isinstance(error, (*answers, FlexibleChecksumError, ClientError, OSError, TimeoutError, EOFError))


def _with_remedy(reason: str) -> str:
    return f"{reason}; {_REMEDIES[reason]}" if reason in _REMEDIES else reason
