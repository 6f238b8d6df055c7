"""The card of a finished training's adapter: what it was trained on, by what right, and how."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from softshard.config import TrainSettings
from softshard.data.authors import Credit
from softshard.data.groups import Tally
from softshard.finetune.card import AdapterCard, CardBalance, CardGroup
from softshard.finetune.record import TrainingReceipt
from softshard.output.workspace import Model
from softshard.shard.manifest import SourceRights
from softshard.stages.train.data import TrainingData, source_credits

__all__ = ["make_card"]


def make_card(
    receipt: TrainingReceipt,
    data: TrainingData,
    settings: TrainSettings,
    *,
    job: str,
    base_model: Model,
    author_shares: Tally,
    retention_sources: tuple[SourceRights, ...],
    num_compared: int,
) -> AdapterCard:
    """The card of a training.

    Args:
        receipt: of the training.
        data: what it trained on.
        settings: the train section of the job, as it is now.
        job: name of the job.
        base_model: the student's model.
        author_shares: largest share of each author, by name.
        retention_sources: of the retention text that it trained on.
        num_compared: number of trainings from which the adapter, or the baseline, is chosen.
    """
    balance = None
    if data.balance is not None:
        groups = tuple(CardGroup(**asdict(group)) for group in data.balance.groups)
        balance = CardBalance(column=data.balance.column, clip=data.balance.clip, groups=groups)
    return AdapterCard(
        job=job,
        base_model=base_model.title,
        base_model_on_hub=base_model.hub_name is not None,
        expert_share=base_model.expert_share,
        manifests=receipt.manifests,
        sources=data.sources,
        retention_sources=retention_sources,
        consent=_consent(data, settings, with_retention=bool(retention_sources)),
        training={
            "training_id": receipt.training_id,
            "objective": receipt.objective,
            "alpha": receipt.alpha,
            "learning_rate": receipt.learning_rate,
            "retention_weight": receipt.retention_weight,
            "num_steps": receipt.num_steps,
            "num_tokens": receipt.num_tokens,
        },
        settings=_settings(settings, base_model),
        author_cap=settings.author_cap,
        author_shares=author_shares,
        balance=balance,
        holdout_nll_nats=receipt.holdout_nll_nats,
        num_compared=num_compared,
    )


def _settings(settings: TrainSettings, base_model: Model) -> dict[str, Any]:
    """The train section without paths of this machine: of a local model or file, only the name is left."""
    values = settings.model_dump(mode="json")
    if values["model"] is not None:
        values["model"] = base_model.title
    for source in values["retention"]["sources"] if values["retention"] else ():
        if source["format"] != "datasets" and "://" not in source["uri"]:
            source["uri"] = Path(source["uri"]).name
    return values


def _consent(data: TrainingData, settings: TrainSettings, *, with_retention: bool) -> dict[str, tuple[str, ...]]:
    """Authors who gave consent, by source; sources of one name in several sets are taken together."""
    known: list[dict[str, Credit]] = [target_set.credited for target_set in data.sets]
    if settings.retention is not None and with_retention:
        known.append(source_credits(settings.retention.sources))
    consenting: dict[str, set[str]] = {}
    for by_source in known:
        for source, credit in by_source.items():
            if credit.consent:
                consenting.setdefault(source, set()).update(credit.consent)
    return {source: tuple(sorted(names)) for source, names in sorted(consenting.items())}
