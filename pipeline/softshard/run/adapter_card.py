"""What a finished training tells of itself in its adapter's card."""

from __future__ import annotations

from dataclasses import asdict

from softshard.run.feed import Feed
from softshard.run.trainings import TrainingPlan
from softshard.run.workspace import Workspace
from softshard.train.card import AdapterCard, CardBalance, CardGroup
from softshard.train.groups import Tally
from softshard.train.loop import FineTuned

__all__ = ["make_card"]


def make_card(
    workspace: Workspace, fed: tuple[Feed, Tally], plan: TrainingPlan, tuned: FineTuned, holdout_nll: float | None
) -> AdapterCard:
    """The card. `fed` is the feed and the authors' shares of it."""
    (feed, authors), settings = fed, workspace.job.train
    balance = None
    if feed.balance is not None:
        groups = tuple(CardGroup(**asdict(one)) for one in feed.balance.groups)
        balance = CardBalance(column=feed.balance.column, clip=feed.balance.clip, groups=groups)
    return AdapterCard(
        job=workspace.job.name,
        base_model=workspace.student_model.name,
        manifests=tuple(one.targets.manifest.digest for one in feed.sets),
        sources=feed.sources,
        training={
            "training_id": plan.training_id,
            "objective": "ce" if plan.alpha == 1 else "kl",
            "alpha": plan.alpha,
            "learning_rate": plan.optimizer.learning_rate,
            "retention_weight": plan.retention_weight,
            "num_steps": len(tuned.log),
            "num_tokens": sum(step.tokens for step in tuned.log),
        },
        settings=settings.model_dump(mode="json"),
        author_cap=settings.author_cap,
        author_shares=authors,
        balance=balance,
        holdout_nll_nats=holdout_nll,
    )
