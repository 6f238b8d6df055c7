"""What went wrong with a request to an object store, told without a word of what the request held.

In: an exception of botocore, aiohttp or the system. Out: a kind that callers act on, and a reason made of the store's
error code, the HTTP status or the exception's class alone. What these libraries say in full may quote headers and
addresses, and with them credentials, so none of it is passed on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Fault", "classify_fault"]

Kind = Literal["missing", "taken", "passing", "full", "unsupported", "refused"]

_KINDS: dict[str, Kind] = {
    "NoSuchKey": "missing",
    "PreconditionFailed": "taken",
    # The bytes arrived damaged, or not all of them.
    "BadDigest": "passing",
    "IncompleteBody": "passing",
    "XAmzContentSHA256Mismatch": "passing",
    # Another request to the same object had not ended.
    "ConditionalRequestConflict": "passing",
    "OperationAborted": "passing",
    "NoSuchUpload": "passing",
    "RequestTimeout": "passing",
    "SlowDown": "passing",
    "Throttling": "passing",
    "ThrottlingException": "passing",
    "RequestLimitExceeded": "passing",
    # Credentials that a machine's role renews, and clocks that a service sets right.
    "ExpiredToken": "passing",
    "RequestTimeTooSkewed": "passing",
    "QuotaExceeded": "full",
    "QuotaExceededException": "full",
    "XMinioStorageFull": "full",
    "NotImplemented": "unsupported",
}
_OF_STATUS: dict[int, Kind] = {
    404: "missing",
    409: "passing",
    412: "taken",
    429: "passing",
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
class Fault:
    """`missing`: no such object; `taken`: a condition did not hold; `passing`: worth another try; `full`: no space;
    `unsupported`: the store cannot do it; `refused`: it never will."""

    kind: Kind
    reason: str


def classify_fault(error: BaseException) -> Fault:
    """What an exception of a request means."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        return _of_response(response)
    # botocore wraps what aiohttp and Python raise, and its own general class says nothing.
    inner = getattr(error, "kwargs", {}).get("error")
    if isinstance(inner, ValueError) or type(error).__name__ == "HTTPClientError":
        error = inner if isinstance(inner, BaseException) else error
    name = type(error).__name__
    return Fault(kind="passing" if _may_pass(error) else "refused", reason=_with_remedy(name))


def _of_response(response: dict[str, Any]) -> Fault:
    code = re.sub("[^A-Za-z0-9]", "", str(response.get("Error", {}).get("Code", "")))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    kind = _KINDS.get(code) or ("refused" if code == "NoSuchBucket" else _OF_STATUS.get(status))
    if kind is None:
        kind = "passing" if status >= 500 else "refused"
    reason = code if code and code != str(status) else f"HTTP {status}"
    return Fault(kind=kind, reason=_with_remedy(reason))


def _may_pass(error: BaseException) -> bool:
    """Whether a request that got no whole answer may get one later."""
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
