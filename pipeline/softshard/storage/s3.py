"""Requests to an S3-compatible server, tried again while they may pass.

Endpoint, region and credentials are those of the environment: AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_PROFILE, or the machine's role. One connection pool a process is kept for
each. Tries again with pauses that double and are drawn at random below that, so that workers which were refused
together do not come back together.
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
from softshard.storage.faults import Fault, classify_fault

__all__ = ["S3", "Passing", "Patience", "Taken", "Unsupported"]

Result = TypeVar("Result")


class Taken(Exception):
    """The condition of a request did not hold."""


class Unsupported(StoreUnusable):
    """The server cannot do what a request asks for."""


class Passing(Exception):
    """A request that is worth another try; the message says why, without what it held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How often a request is tried, and how long it is waited for."""

    attempts: int = 10
    first_seconds: float = 0.2
    """Longest pause before the second attempt; twice that before the third, and so on."""
    most_seconds: float = 15.0
    """Longest pause of all."""
    connect_seconds: float = 10.0
    read_seconds: float = 60.0
    """Longest silence of a server that has the request."""


@dataclass(slots=True)
class _Connection:
    """What a process keeps for one set of credentials."""

    file_system: Any
    conditional: set[str] = field(default_factory=set)
    """Buckets that were seen to keep a condition."""


class S3:
    """The server of the environment, asked about the objects of one store.

    Args:
        uri: of the store, for errors.
    """

    def __init__(self, *, uri: str, patience: Patience) -> None:
        self._uri, self._patience = uri, patience
        self._random = random.Random(os.urandom(16))  # noqa: S311 - for pauses, which no two processes should share

    @property
    def conditional(self) -> set[str]:
        """Buckets that were seen to keep a condition, in this process."""
        return self._connection().conditional

    def call(self, method: str, *, about: str = "", **arguments: Any) -> dict[str, Any]:
        """A request, tried again while it may pass.

        Args:
            method: of botocore's client.
            about: path that it concerns, for errors.
            arguments: of the method; a None is left out.

        Returns:
            The answer; what it streams is read whole and is its `Content`.

        Raises:
            FileNotFoundError, Taken, Unsupported, StorageFull, StoreUnusable: as `once`.
            StoreUnavailable: it did not pass in all attempts.
        """
        return self.retry(lambda: self.once(method, about=about, **arguments), about=about)

    def pages(
        self, *, bucket: str, prefix: str, about: str, keys_per_page: int = 1000, **options: str
    ) -> Iterator[dict[str, Any]]:
        """Answers of a listing of the keys that start with a prefix, one after another until it is complete."""
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

    def retry(self, function: Callable[[], Result], *, about: str = "") -> Result:
        """What a function returns once it does not raise `Passing`. Raises StoreUnavailable, and what it raises."""
        patience = self._patience
        for attempt in range(1, patience.attempts):
            try:
                return function()
            except Passing:
                longest = min(patience.first_seconds * 2 ** (attempt - 1), patience.most_seconds)
                time.sleep(self._random.uniform(0, longest))
        try:
            return function()
        except Passing as error:
            reason = f"{error}, {patience.attempts} attempts"
            raise StoreUnavailable(uri=self._named(about), reason=reason) from None

    def once(self, method: str, *, about: str = "", **arguments: Any) -> dict[str, Any]:
        """A request, tried once.

        Raises:
            FileNotFoundError: there is no such object.
            Taken: its condition did not hold.
            Unsupported: the server cannot do it.
            Passing: it may pass another time.
            StorageFull: the store has no space left.
            StoreUnusable: the server refuses it, or the environment has no credentials.
        """
        from aiohttp import ClientError as HttpError
        from botocore.exceptions import BotoCoreError, ClientError
        from fsspec.asyn import sync

        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            file_system = self._connection().file_system
            answer: dict[str, Any] = sync(file_system.loop, _send, file_system.s3, method, given)
        except (BotoCoreError, ClientError, HttpError, OSError, TimeoutError, EOFError, ValueError) as error:
            fault = classify_fault(error)
        else:
            return answer
        # Outside the handler, so that what a library said, which may hold credentials, is in no traceback of ours.
        raise self._error(fault, about)

    def _error(self, fault: Fault, about: str) -> Exception:
        uri = self._named(about)
        if fault.kind == "missing":
            return FileNotFoundError(uri)
        if fault.kind == "full":
            return StorageFull(uri=uri)
        if fault.kind in {"taken", "passing"}:
            return Taken(fault.reason) if fault.kind == "taken" else Passing(fault.reason)
        kind = Unsupported if fault.kind == "unsupported" else StoreUnusable
        return kind(uri=uri, problem=fault.reason)

    def _named(self, about: str) -> str:
        return f"{self._uri}/{about}" if about else self._uri

    def _connection(self) -> _Connection:
        environment = repr(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))
        key = hashlib.sha256(environment.encode(errors="surrogateescape")).digest()
        try:
            return _connect(os.getpid(), key, self._patience.connect_seconds, self._patience.read_seconds)
        except ImportError:
            raise ExtraMissing(what=self._uri, package="s3fs", extra="s3") from None


@lru_cache(maxsize=16)
def _connect(pid: int, environment: bytes, connect_seconds: float, read_seconds: float) -> _Connection:
    """One for a process and its variables: neither a pool nor an event loop outlives a fork."""
    import s3fs

    own_server = bool(os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT_URL_S3"))
    region = os.environ.get("AWS_REGION")
    file_system = s3fs.S3FileSystem(
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={
            "connect_timeout": connect_seconds,
            "read_timeout": read_seconds,
            "max_pool_connections": 32,
            # Tries are counted here, in one place.
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            # Each request carries a digest in a header; botocore's own way, a trailer, is unknown to many servers.
            "request_checksum_calculation": "when_required",
            # Few servers but Amazon's have a name of their own for every bucket.
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
