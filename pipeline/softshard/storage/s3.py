"""Requests to an S3-compatible server, with a retry policy.

Endpoint, region and credentials come from the environment: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, or the machine's role. A process keeps one connection pool for
each of these environments. Pauses between attempts are random, below a limit that doubles, so that workers which failed
together do not retry together.
"""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

from softshard.errors import ExtraMissing, StorageFull, StoreUnavailable, StoreUnusable
from softshard.storage.failures import Failure, classify_failure

__all__ = ["S3", "ConditionFailed", "RetryPolicy", "TransientFailure", "UnsupportedRequest"]

Result = TypeVar("Result")


class ConditionFailed(Exception):
    """The condition of a request did not hold: an object exists, or has changed."""


class UnsupportedRequest(StoreUnusable):
    """The server does not implement the request."""


class TransientFailure(Exception):
    """A request failed and a retry may succeed; the message gives the reason, without what the request contained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How often a request is tried, the pauses between attempts, and the timeouts of each attempt."""

    attempts: int = 10
    first_pause_seconds: float = 0.2
    """Longest pause before the second attempt; twice that before the third, and so on."""
    max_pause_seconds: float = 15.0
    """Longest pause."""
    connect_timeout_seconds: float = 10.0
    read_timeout_seconds: float = 60.0
    """Longest silence of a server that has received the request."""


@dataclass(slots=True)
class _Connection:
    """The connection of a process for one set of credentials."""

    file_system: Any
    conditional: set[str] = field(default_factory=set)
    """Buckets whose server was found to enforce conditions."""


class S3:
    """The server of the environment, asked about the objects of one store.

    Args:
        uri: of the store, for errors.
        retry: of every request.
    """

    def __init__(self, *, uri: str, retry: RetryPolicy) -> None:
        self._uri, self._retry = uri, retry
        self._random = random.Random(os.urandom(16))  # noqa: S311 - for pauses, which no two processes should share

    @property
    def conditional(self) -> set[str]:
        """Buckets whose server was found to enforce conditions, in this process."""
        return self._connection().conditional

    def call(self, method: str, *, about: str = "", **arguments: Any) -> dict[str, Any]:
        """Send a request, with retries.

        Args:
            method: of botocore's client.
            about: path of the object, for errors.
            arguments: of the method; those that are None are left out.

        Returns:
            The answer; a streamed body is read whole into its `Content`.

        Raises:
            FileNotFoundError, ConditionFailed, UnsupportedRequest, StorageFull, StoreUnusable: as `call_once`.
            StoreUnavailable: all attempts failed.
        """
        return self.call_with_retries(lambda: self.call_once(method, about=about, **arguments), about=about)

    def pages(
        self, *, bucket: str, prefix: str, about: str, keys_per_page: int = 1000, **options: str
    ) -> Iterator[dict[str, Any]]:
        """Pages of the listing of all keys that start with a prefix."""
        token = None
        while True:
            page = self.call(
                "list_objects_v2",
                about=about,
                Bucket=bucket,
                Prefix=prefix,
                MaxKeys=keys_per_page,
                ContinuationToken=token,
                **options,
            )
            yield page
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or token is None:
                return

    def call_with_retries(self, function: Callable[[], Result], *, about: str = "") -> Result:
        """Call a function again while it raises TransientFailure; StoreUnavailable when all attempts failed."""
        retry = self._retry
        for attempt in range(1, retry.attempts):
            try:
                return function()
            except TransientFailure:
                longest = min(retry.first_pause_seconds * 2 ** (attempt - 1), retry.max_pause_seconds)
                time.sleep(self._random.uniform(0, longest))
        try:
            return function()
        except TransientFailure as error:
            reason = f"{error}, {retry.attempts} attempts"
            raise StoreUnavailable(uri=self._uri_at(about), reason=reason) from None

    def call_once(self, method: str, *, about: str = "", **arguments: Any) -> dict[str, Any]:
        """Send a request, without a retry.

        Raises:
            FileNotFoundError: there is no such object.
            ConditionFailed: the condition of the request did not hold.
            UnsupportedRequest: the server does not implement the request.
            TransientFailure: a retry may succeed.
            StorageFull: the store has no space left.
            StoreUnusable: the server refuses the request, or the environment has no credentials.
        """
        from aiohttp import ClientError as HttpError
        from botocore.exceptions import BotoCoreError, ClientError
        from fsspec.asyn import sync

        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            file_system = self._connection().file_system
            answer: dict[str, Any] = sync(file_system.loop, _send, file_system.s3, method, given)
        except (BotoCoreError, ClientError, HttpError, OSError, TimeoutError, EOFError, ValueError) as error:
            failure = classify_failure(error)
        else:
            return answer
        # Outside the handler, so that the library's message, which may hold credentials, is in no traceback of ours.
        raise self._error(failure, about)

    def _error(self, failure: Failure, about: str) -> Exception:
        uri = self._uri_at(about)
        if failure.kind == "missing":
            return FileNotFoundError(uri)
        if failure.kind == "full":
            return StorageFull(uri=uri)
        if failure.kind in {"condition_failed", "transient"}:
            return (
                ConditionFailed(failure.reason)
                if failure.kind == "condition_failed"
                else TransientFailure(failure.reason)
            )
        kind = UnsupportedRequest if failure.kind == "unsupported" else StoreUnusable
        return kind(uri=uri, problem=failure.reason)

    def _uri_at(self, about: str) -> str:
        return f"{self._uri}/{about}" if about else self._uri

    def _connection(self) -> _Connection:
        environment = repr(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
        key = hashlib.sha256(environment.encode(errors="surrogateescape")).digest()
        try:
            return _connect(os.getpid(), key, self._retry.connect_timeout_seconds, self._retry.read_timeout_seconds)
        except ImportError:
            raise ExtraMissing(what=self._uri, package="s3fs", extra="s3") from None


@lru_cache(maxsize=16)
def _connect(pid: int, environment: bytes, connect_timeout_seconds: float, read_timeout_seconds: float) -> _Connection:
    """The connection of one process and environment: neither a pool nor an event loop survives a fork."""
    import s3fs

    own_server = bool(os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"))
    region = os.environ.get("AWS_REGION")
    file_system = s3fs.S3FileSystem(
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": connect_timeout_seconds,
            "read_timeout": read_timeout_seconds,
            "max_pool_connections": 32,
            # Retries are made by S3.call_with_retries alone.
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Each request carries a digest in a header; botocore's own way, a trailer, is unknown to many servers.
            "request_checksum_calculation": "when_required",
            # Few servers other than Amazon's have a host name for every bucket.
            "s3": {"addressing_style": "path" if own_server else "auto"},
        },
        skip_instance_cache=True,
        use_listings_cache=False,
    )
    return _Connection(file_system=file_system)


async def _send(client: Any, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
    answer: dict[str, Any] = await getattr(client, method)(**arguments)
    body = answer.pop("Body", None)
    if body is not None:
        async with body as stream:
            answer["Content"] = await stream.read()
    return answer
