"""Removes credentials from text before it is written to a log, to metrics or into an error."""

from __future__ import annotations

import re

__all__ = ["without_credentials"]

_HIDDEN = "***"
# The part of a URI before the @ of its host (a secret key may contain a slash, but after a host's colon comes a port);
# the query of a signed URI; an assignment as in an environment; an HTTP header.
_USER = re.compile(r"(?i)\b([a-z][a-z0-9+.-]*://)(?:[^/?#\s]*|[^/?#\s@:]*:(?![0-9]+[/?#])\S*)@")
_QUERY = re.compile(
    r"(?i)([?&][^=&\s]*(?:signature|sig|token|secret|password|credential|accesskeyid|key)=)[^&\s\"'<>]+"
)
_VARIABLE = re.compile(r"\b([A-Z0-9_]*(?:SECRET|PASSWORD|TOKEN|ACCESS_KEY|API_KEY)[A-Z0-9_]*=)[^\s\"',;]+")
_HEADER = re.compile(r"(?i)\b(authorization:? *(?:bearer|basic)? +|bearer +)[a-z0-9._~+/=-]{8,}")


def without_credentials(text: str) -> str:
    """The text with `***` in place of user names and passwords in URIs, signatures, tokens and secret keys."""
    for pattern in (_USER, _QUERY, _VARIABLE, _HEADER):
        text = pattern.sub(rf"\1{_HIDDEN}" + ("@" if pattern is _USER else ""), text)
    return text
