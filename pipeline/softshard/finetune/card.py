"""The card of an adapter: `card.json` and a README.md with the metadata header of the Hugging Face hub.

In: what it was trained on, with which settings, and what it measured. Out: two files, a function of that. They speak of
rights, consent and what else was tried too, which can change when the adapter does not, so that no receipt names them.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from softshard.records.canonical import canonical_json
from softshard.shard.manifest import SourceRights
from softshard.storage import Store

__all__ = ["AdapterCard", "CardBalance", "CardGroup", "card_files", "renew_card"]


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
    retention_sources: tuple[SourceRights, ...]
    """Of the retention text; empty where the training takes none."""
    consent: dict[str, tuple[str, ...]]
    """Authors who agreed, by source, of all these."""
    training: dict[str, Any]
    """Id, objective, alpha, learning rate, retention weight, steps and tokens."""
    settings: dict[str, Any]
    """The job's train section, defaults included."""
    author_cap: float
    author_shares: dict[str, float]
    """The most that each author who is named and not under consent has at any step, of the train tokens or of their
    weight in the loss."""
    balance: CardBalance | None
    holdout_nll_nats: float | None
    """Mean NLL of the hold-out's own tokens; null without a hold-out."""
    num_compared: int
    """Trainings of which the one with the least NLL on this hold-out was to be taken, this one included."""


def renew_card(store: Store, folder: str, card: AdapterCard) -> None:
    """Write the card beside an adapter, unless it says so already."""
    for name, content in card_files(card).items():
        path = f"{folder}/{name}"
        if not store.exists(path) or store.read(path) != content:
            store.replace(path, content)


def card_files(card: AdapterCard) -> dict[str, bytes]:
    """Content of `card.json` and `README.md`."""
    lines = ["---", yaml.safe_dump(_header(card), sort_keys=True, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# Adapter of {card.job}", "", "An adapter that was trained on stored next-token distributions.", ""]
    lines += ["| training | |", "|---|---|", *(f"| {name} | {value} |" for name, value in card.training.items())]
    if card.holdout_nll_nats is not None:
        lines.append(f"| hold-out NLL, nats a token | {card.holdout_nll_nats:.4f} |")
    if card.num_compared > 1:
        lines += ["", f"One of {card.num_compared} trainings, of which the best on this very hold-out is taken: that"]
        lines += ["figure favours the one that is."]
    lines += ["", "## Data", "", *(f"- manifest `{digest}`" for digest in card.manifests), ""]
    lines += [*_sources(card.sources), ""]
    if card.retention_sources:
        lines += ["Retention text:", "", *_sources(card.retention_sources), ""]
    lines += [*_authors(card), *_groups(card.balance)]
    lines += ["`card.json` has all of this and the settings in full.", ""]
    return {"README.md": "\n".join(lines).encode(), "card.json": canonical_json(card)}


def _sources(sources: tuple[SourceRights, ...]) -> list[str]:
    rows = (f"| {_cell(s.name)} | {_cell(s.style)} | {s.license} | {s.rights_basis} |" for s in sources)
    return ["| source | style | licence | rights |", "|---|---|---|---|", *rows]


def _header(card: AdapterCard) -> dict[str, Any]:
    """Keys that the hub knows; it has one licence a model, and names several `other`."""
    licences = sorted({source.license for source in (*card.sources, *card.retention_sources)})
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
    agreed = sum(len(names) for names in card.consent.values())
    consent = [f"{agreed} author(s) gave consent and are not counted.", ""] if agreed else []
    if largest is None:
        return [f"No author is counted against the cap of {card.author_cap:.0%} of the train tokens.", "", *consent]
    shares = f"the largest has {largest:.1%} of the train tokens or of the loss, the cap is {card.author_cap:.0%}"
    return [f"{len(card.author_shares)} author(s) are counted; {shares}.", "", *consent]


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
