"""Where the tasks run."""

from __future__ import annotations

from pydantic import Field, model_validator

from softshard.config.base import Settings

__all__ = [
    "AdaptiveSettings",
    "ClusterSettings",
]


class AdaptiveSettings(Settings):
    """Bounds of a local cluster that grows while parts wait and shrinks when workers are idle."""

    minimum: int = Field(default=0, ge=0)
    """Fewest workers."""
    maximum: int = Field(ge=1)
    """Most workers."""

    @model_validator(mode="after")
    def _consistent(self) -> AdaptiveSettings:
        if self.minimum > self.maximum:
            raise ValueError(f"minimum ({self.minimum}) must be at most maximum ({self.maximum})")
        return self


class ClusterSettings(Settings):
    """Where the tasks run: on a local Dask cluster, or on one that is already running."""

    workers: int = Field(default=1, ge=1)
    """Worker processes of the local cluster; each holds one engine."""
    adaptive: AdaptiveSettings | None = None
    """Let the local cluster grow and shrink; `workers` is then not used."""
    scheduler: str | None = None
    """Address of a running scheduler (tcp://host:port, tls://host:port); its workers need the resource `teacher=1`."""
    scheduler_file: str | None = None
    """File to which a running scheduler writes its address (`dask scheduler --scheduler-file`); it may appear later."""
    max_attempts: int = Field(default=3, ge=1)
    """Attempts per part, each on another worker where there is one, before the part is set aside."""
    retry_seconds: float = Field(default=2.0, ge=0)
    """Longest pause before the second attempt; twice that before the third and so on, at most a minute."""
    grace_seconds: float = Field(default=20.0, ge=0)
    """Seconds that parts in progress have to finish after SIGTERM or Ctrl-C; parts that take longer are dropped."""

    @property
    def is_local(self) -> bool:
        """Whether the workers are processes that this one starts."""
        return self.scheduler is None and self.scheduler_file is None

    @property
    def most_workers(self) -> int:
        """Most workers of the local cluster."""
        return self.adaptive.maximum if self.adaptive else self.workers

    @model_validator(mode="after")
    def _one_cluster(self) -> ClusterSettings:
        named = [name for name in ("adaptive", "scheduler", "scheduler_file") if getattr(self, name) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} exclude each other: only a local cluster is adapted from here")
        return self
