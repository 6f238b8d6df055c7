"""Text without the credentials that may stand in it: what goes to a log, to metrics or into an error is made so."""

from __future__ import annotations

import re

__all__ = ["without_credentials"]

_HIDDEN = "***"
# The part of a URI before the @ of its host (a secret key may hold a slash, but what follows a host's colon is a port);
# a signed URI's query; an assignment as in an environment; a header.
_USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(?:[^/?#\s]*|[^/?#\s@:]*:(?![0-9]+[/?#])\S*)@")
_QUERY = re.compile(
    r"(?i)([?&][^=&\s]*(?:signature|sig|token|secret|password|credential|accesskeyid|key)=)[^&\s\"'<>]+"
)
_VARIABLE = re.compile(r"\b([A-Z0-9_]*(?:SECRET|PASSWORD|TOKEN|ACCESS_KEY|API_KEY)[A-Z0-9_]*=)[^\s\"',;]+")
_HEADER = re.compile(r"(?i)\b(authorization:? *(?:bearer|basic)? +|bearer +)[a-z0-9._~+/=-]{8,}")


def without_credentials(text: str) -> str:
    """The text with user names and passwords of URIs, signatures, tokens and secret keys as `***`."""
    for pattern in (_USER, _QUERY, _VARIABLE, _HEADER):
        text = pattern.sub(rf"\1{_HIDDEN}" + ("@" if pattern is _USER else ""), text)
    return text
