"""Measuring a model on held-out text: the test split of the targets, and that of the retention text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from softshard.config import EvaluateSettings
from softshard.evaluate.scoring import HoldoutScores, retention_nll, score_holdout
from softshard.models import Tokenizer
from softshard.output.workspace import Workspace
from softshard.shard.manifest import Manifest
from softshard.shard.read import Row, read_rows
from softshard.shard.schema import PartMetadata
from softshard.stages.corpus.stage import StoredCorpus
from softshard.storage import Store

__all__ = ["Holdout", "make_holdout"]


def _ignore_progress(done: float) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Holdout:
    """The held-out text of a job, and how a model is scored on it."""

    targets: Store
    manifest: Manifest
    retention: StoredCorpus | None
    tokenizer: Tokenizer
    """Of the teacher, with which the targets were made: its token ends a document."""
    settings: EvaluateSettings

    @property
    def num_labels(self) -> int:
        """Labels of the test split of the targets."""
        return sum(receipt.num_labels for receipt in self.manifest.of_split("test"))

    def rows(self) -> Iterator[tuple[Row, PartMetadata]]:
        """Stored sequences of the test split, in the manifest's order."""
        for receipt in self.manifest.of_split("test"):
            yield from read_rows(self.targets, receipt)

    def score(self, model: Any, *, on_progress: Callable[[float], None] = _ignore_progress) -> HoldoutScores:
        """Scores of a model on the test split; `on_progress` is called with the number of labels scored."""
        return score_holdout(
            model,
            self.rows(),
            tokenizer=self.tokenizer,
            num_valid=self.manifest.vocab_size,
            batch_tokens=self.settings.batch_tokens,
            num_bins=self.settings.calibration_bins,
            on_progress=on_progress,
        )

    def retention_nll(self, model: Any) -> float | None:
        """Mean NLL of a model on the held-out retention text, in nats per token; None where there is no such text."""
        if self.retention is None:
            return None
        return retention_nll(
            model,
            self.retention.sequences("test"),
            num_valid=self.manifest.vocab_size,
            batch_tokens=self.settings.batch_tokens,
            on_progress=_ignore_progress,
        )


def make_holdout(workspace: Workspace, manifest: Manifest, retention: StoredCorpus | None) -> Holdout:
    """The held-out text of a job, with the settings of its evaluate section."""
    return Holdout(
        targets=workspace.targets,
        manifest=manifest,
        retention=retention,
        tokenizer=workspace.teacher_model.tokenizer,
        settings=workspace.job.evaluate,
    )
