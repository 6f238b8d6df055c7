"""The card of an adapter: `card.json` and a README.md with the metadata header of the Hugging Face hub.

In: the data, the settings and the measurements of a training. Out: two files, a function of these. They also describe
rights, consent and other trainings, which can change without the adapter, so no receipt names these files.
"""

from __future__ import annotations

from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from softshard.finetune.adapters.output import OUTPUT_ADAPTERS
from softshard.records.canonical import canonical_json
from softshard.shard.card import licence_header
from softshard.shard.manifest import SourceRights
from softshard.storage import Store

__all__ = ["AdapterCard", "CardBalance", "CardGroup", "card_files", "renew_card"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class CardGroup(_Record):
    """One group before and after weighting."""

    group: str
    share_before: float
    share_wanted: float
    weight: float
    clipped: bool
    share_after: float


class CardBalance(_Record):
    """The weights of groups."""

    column: str
    clip: tuple[float, float]
    groups: tuple[CardGroup, ...]


class AdapterCard(_Record):
    """The data, settings and measurements of an adapter."""

    job: str
    base_model: str
    """Its name on the hub, or that of its folder without the path to it."""
    base_model_on_hub: bool
    expert_share: float
    """Share of the base model's weights that are experts, which the adapter does not change; 0 for most models."""
    manifests: tuple[str, ...]
    """Digests of the target sets' manifests; the job's own comes first, if it is used."""
    sources: tuple[SourceRights, ...]
    retention_sources: tuple[SourceRights, ...]
    """Of the retention text; empty without retention."""
    consent: dict[str, tuple[str, ...]]
    """Authors who gave consent, by source, for all of these sources."""
    training: dict[str, Any]
    """Id, objective, alpha, learning rate, retention weight, steps and tokens."""
    settings: dict[str, Any]
    """The job's train section, including defaults; of local models and files only the names."""
    author_cap: float
    author_shares: dict[str, float]
    """Largest share at any step, of the train tokens or of their weight in the loss, of each named author who has not
    given consent."""
    balance: CardBalance | None
    holdout_nll_nats: float | None
    """Mean NLL of the hold-out's own tokens; null without a hold-out."""
    num_compared: int
    """Number of trainings, including this one, among which the lowest NLL on this hold-out was chosen."""


def renew_card(store: Store, folder: str, card: AdapterCard) -> None:
    """Write the card beside an adapter if its content changes."""
    for name, content in card_files(card).items():
        path = f"{folder}/{name}"
        if not store.exists(path) or store.read(path) != content:
            store.replace(path, content)


def card_files(card: AdapterCard) -> dict[str, bytes]:
    """Content of `card.json` and `README.md`."""
    lines = ["---", yaml.safe_dump(_header(card), sort_keys=True, allow_unicode=True).rstrip(), "---", ""]
    lines += [f"# Adapter of {card.job}", "", _introduction(card), "", *_usage(card), ""]
    lines += ["| training | |", "|---|---|", *(f"| {name} | {value} |" for name, value in card.training.items())]
    if card.holdout_nll_nats is not None:
        lines.append(f"| hold-out NLL, nats per token | {card.holdout_nll_nats:.4f} |")
    if card.num_compared > 1:
        lines += ["", f"One of {card.num_compared} trainings. The best on this hold-out was chosen, so this figure"]
        lines += ["favours the chosen one."]
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
    """Keys that the hub knows; it looks `base_model` up, so a folder's name is left out."""
    reads_peft = _is_of_peft(card)
    header: dict[str, Any] = {
        "library_name": "peft" if reads_peft else "softshard",
        "pipeline_tag": "text-generation",
        "tags": ["knowledge-distillation", *(["lora"] if reads_peft else []), "soft-labels"],
    }
    if card.base_model_on_hub:
        header["base_model"] = card.base_model
    return {**header, **licence_header((*card.sources, *card.retention_sources))}


def _is_of_peft(card: AdapterCard) -> bool:
    return card.settings["adapter"] not in OUTPUT_ADAPTERS


def _introduction(card: AdapterCard) -> str:
    place = "a name on the hub" if card.base_model_on_hub else "a local folder when it was trained"
    sentences = [
        f"An adapter (`{card.settings['adapter']}`) of {card.base_model}, {place}.",
        "It was trained on stored next-token distributions.",
    ]
    if card.expert_share:
        sentences.append(f"{card.expert_share:.0%} of the model's weights are experts, which it leaves as they are.")
    return " ".join(sentences)


def _usage(card: AdapterCard) -> list[str]:
    """How to load it, as Python."""
    if _is_of_peft(card):
        lines = [
            "from peft import AutoPeftModelForCausalLM",
            'model = AutoPeftModelForCausalLM.from_pretrained("FOLDER_OF_THIS_ADAPTER")',
        ]
    else:
        lines = [
            "from pathlib import Path",
            "from transformers import AutoModelForCausalLM",
            "from softshard import load_adapter",
            f'base = AutoModelForCausalLM.from_pretrained("{card.base_model}")',
            'model = load_adapter(base, Path("FOLDER_OF_THIS_ADAPTER"), device="cpu")',
        ]
    return ["```python", *lines, "```"]


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
    for group in balance.groups:
        weight = f"{group.weight:.3f}{', clipped' if group.clipped else ''}"
        shares = f"{group.share_before:.1%} | {group.share_wanted:.1%} | {weight} | {group.share_after:.1%}"
        lines.append(f"| {_cell(group.group)} | {shares} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """Text of a corpus as one cell of a table."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
