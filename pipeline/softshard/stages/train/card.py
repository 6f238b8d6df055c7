"""What a finished training tells of itself in its adapter's card."""

from __future__ import annotations

from dataclasses import asdict

from softshard.data.authors import Credit
from softshard.data.groups import Tally
from softshard.finetune.card import AdapterCard, CardBalance, CardGroup
from softshard.finetune.record import TrainingReceipt
from softshard.output.workspace import Workspace
from softshard.shard.manifest import SourceRights
from softshard.stages.train.data import TrainingData, source_credits

__all__ = ["make_card"]


def make_card(
    workspace: Workspace,
    fed: tuple[TrainingData, Tally],
    receipt: TrainingReceipt,
    retention: tuple[SourceRights, ...],
    *,
    num_compared: int,
) -> AdapterCard:
    """The card.

    Args:
        workspace: of the job, as it is now.
        fed: the feed, and the authors' shares of it.
        receipt: of the training.
        retention: sources of the retention text that it took.
        num_compared: trainings among which one like this is chosen.
    """
    (feed, authors), settings = fed, workspace.job.train
    balance = None
    if feed.balance is not None:
        groups = tuple(CardGroup(**asdict(one)) for one in feed.balance.groups)
        balance = CardBalance(column=feed.balance.column, clip=feed.balance.clip, groups=groups)
    return AdapterCard(
        job=workspace.job.name,
        base_model=workspace.student_model.name,
        manifests=receipt.manifests,
        sources=feed.sources,
        retention_sources=retention,
        consent=_consent(workspace, feed, bool(retention)),
        training={
            "training_id": receipt.training_id,
            "objective": receipt.objective,
            "alpha": receipt.alpha,
            "learning_rate": receipt.learning_rate,
            "retention_weight": receipt.retention_weight,
            "num_steps": receipt.num_steps,
            "num_tokens": receipt.num_tokens,
        },
        settings=settings.model_dump(mode="json"),
        author_cap=settings.author_cap,
        author_shares=authors,
        balance=balance,
        holdout_nll_nats=receipt.holdout_nll_nats,
        num_compared=num_compared,
    )


def _consent(workspace: Workspace, feed: TrainingData, with_retention: bool) -> dict[str, tuple[str, ...]]:
    """Authors who agreed, by source; where sets have sources of one name, of all of them."""
    retention = workspace.job.train.retention
    known: list[dict[str, Credit]] = [one.credited for one in feed.sets]
    if retention is not None and with_retention:
        known.append(source_credits(retention.sources))
    agreed: dict[str, set[str]] = {}
    for credited in known:
        for source, credit in credited.items():
            if credit.consent:
                agreed.setdefault(source, set()).update(credit.consent)
    return {source: tuple(sorted(names)) for source, names in sorted(agreed.items())}
