"""The card of an adapter: `card.json` and a README.md with the metadata header of the Hugging Face hub.

In: what it was trained on, with which settings, and what it measured. Out: two files, a function of that.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from softshard.shard.manifest import SourceRights, canonical_json

__all__ = ["AdapterCard", "CardBalance", "CardGroup", "card_files"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CardGroup(_Record):
    """One group before and after it was weighed."""

    group: str
    share_before: float
    share_wanted: float
    weight: float
    clipped: bool
    share_after: float


class CardBalance(_Record):
    """How groups were weighed."""

    column: str
    clip: tuple[float, float]
    groups: tuple[CardGroup, ...]


class AdapterCard(_Record):
    """What an adapter is made of."""

    job: str
    base_model: str
    manifests: tuple[str, ...]
    """Digests of the target sets' manifests, the job's own first where it takes part."""
    sources: tuple[SourceRights, ...]
    training: dict[str, Any]
    """Id, objective, alpha, learning rate, retention weight, steps and tokens."""
    settings: dict[str, Any]
    """The job's train section, defaults included."""
    author_cap: float
    author_shares: dict[str, float]
    """Most share of the train tokens of each author who is named and not under consent, at any step."""
    balance: CardBalance | None
    holdout_nll_nats: float | None
    """Mean NLL of the hold-out's own tokens; null without a hold-out."""


def card_files(card: AdapterCard) -> dict[str, bytes]:
    """Content of `card.json` and `README.md`."""
    lines = ["---", yaml.safe_dump(_header(card), sort_keys=True, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# Adapter of {card.job}", "", "An adapter that was trained on stored next-token distributions.", ""]
    lines += ["| training | |", "|---|---|", *(f"| {name} | {value} |" for name, value in card.training.items())]
    if card.holdout_nll_nats is not None:
        lines.append(f"| hold-out NLL, nats a token | {card.holdout_nll_nats:.4f} |")
    lines += ["", "## Data", "", *(f"- manifest `{digest}`" for digest in card.manifests), ""]
    lines += ["| source | style | licence | rights |", "|---|---|---|---|"]
    lines += [f"| {_cell(s.name)} | {_cell(s.style)} | {s.license} | {s.rights_basis} |" for s in card.sources]
    lines += ["", *_authors(card), *_groups(card.balance)]
    lines += ["`card.json` has all of this and the settings in full.", ""]
    return {"README.md": "\n".join(lines).encode(), "card.json": canonical_json(card)}


def _header(card: AdapterCard) -> dict[str, Any]:
    """Keys that the hub knows; it has one licence a model, and names several `other`."""
    licences = sorted({source.license for source in card.sources})
    header: dict[str, Any] = {
        "base_model": card.base_model,
        "library_name": "peft",
        "tags": ["knowledge-distillation", "lora", "soft-labels"],
    }
    if len(licences) == 1 and not licences[0].startswith("LicenseRef-") and " " not in licences[0]:
        return {**header, "license": licences[0].lower()}
    return {**header, "license": "other", "license_name": ", ".join(licences)}


def _authors(card: AdapterCard) -> list[str]:
    largest = max(card.author_shares.values(), default=None)
    if largest is None:
        return [f"No author is counted against the cap of {card.author_cap:.0%} of the train tokens.", ""]
    shares = f"the largest has {largest:.1%} of the train tokens, the cap is {card.author_cap:.0%}"
    return [f"{len(card.author_shares)} author(s) are counted; {shares}.", ""]


def _groups(balance: CardBalance | None) -> list[str]:
    if balance is None:
        return []
    low, high = balance.clip
    lines = [f"Groups by `{balance.column}`, weights clipped to {low:g} to {high:g}:", ""]
    lines += ["| group | share before | share wanted | weight | share after |", "|---|---|---|---|---|"]
    for one in balance.groups:
        weight = f"{one.weight:.3f}{', clipped' if one.clipped else ''}"
        shares = f"{one.share_before:.1%} | {one.share_wanted:.1%} | {weight} | {one.share_after:.1%}"
        lines.append(f"| {_cell(one.group)} | {shares} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """Text of a corpus as one cell of a table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
