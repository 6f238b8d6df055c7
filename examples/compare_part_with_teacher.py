"""Does a stored part match its teacher? polars and numpy read the part, transformers and peft score the text again.

    python examples/compare_part_with_teacher.py runs/demo --sequences 8

softshard is not imported. For every label of a few sequences of the first training part, the head must hold the tokens
with a probability of at least tau, each within half a step of its distance from the most likely one. The tail must be
a possible sample: its number of entries is the tail's mass in units of tau, rounded down or up, and its squared error,
summed over all labels, is close to the expected one, the sum over the tail of p (tau - p).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main() -> None:
    """Compare, print the differences, and fail if one is too large."""
    parser = argparse.ArgumentParser(description="Compare a stored part with a forward pass of its style teacher.")
    parser.add_argument("out", type=Path, help="output folder of a job")
    parser.add_argument("--sequences", type=int, default=8)
    arguments = parser.parse_args()
    targets = arguments.out / "targets"
    pointer = json.loads((targets / "manifest.json").read_text())
    manifest = json.loads((targets / pointer["manifest"]).read_text())
    part = next(part for part in manifest["parts"] if part["split"] == "train")
    metadata = json.loads(pl.read_parquet_metadata(targets / part["path"])["softshard"])
    frequent = np.array(metadata["frequent_ids"], dtype=np.int64)
    ids = np.append(frequent, np.setdiff1d(np.arange(metadata["vocab_size"]), frequent))
    model = load_teacher(arguments.out, part["fold"])
    rows = pl.read_parquet(targets / part["path"]).head(arguments.sequences)
    found = [compare(row, metadata, ids, model) for row in rows.iter_rows(named=True)]
    report(found, metadata)


def load_teacher(out: Path, fold: int) -> Any:
    """The teacher model with the adapter that scored the fold."""
    job = yaml.safe_load((out / "job.yaml").read_text())
    model = AutoModelForCausalLM.from_pretrained(job["teacher"]["model"], dtype=torch.float32)
    receipts = sorted((out / "teacher").glob(f"fold-{fold}-*/receipt.json"), key=lambda path: path.stat().st_mtime)
    return PeftModel.from_pretrained(model, receipts[-1].parent).eval() if receipts else model.eval()


def compare(row: dict[str, Any], metadata: dict[str, Any], by_rank: Any, model: Any) -> dict[str, Any]:
    """Differences over one sequence's labels; `by_rank` holds token ids in the order of the part's ranks."""
    tokens, first_label = np.array(row["token_ids"]), row.get("first_label")
    runs = row["label_runs"] if first_label is None else [first_label, len(tokens) - first_label]
    places = np.flatnonzero(np.repeat(np.arange(len(runs)) % 2, runs))
    with torch.no_grad():
        logits = model(torch.tensor([row["token_ids"]])).logits[0, places - 1]
    exact = torch.log_softmax(logits[:, : metadata["vocab_size"]].double(), -1).numpy()
    heads, tails = np.cumsum([0, *row["head_count"]]), np.cumsum([0, *row["tail_count"]])
    tau, step = metadata["tau"], metadata["step"]
    steps = np.cumsum([0, *(max(count - 1, 0) for count in row["head_count"])])
    names = ("head", "label", "mass", "edge", "count", "squared", "expected")
    result: dict[str, Any] = {"labels": len(exact), **dict.fromkeys(names, 0.0)}
    labels = tokens[places]
    for j, logp in enumerate(exact):
        ids = by_rank[row["head_ranks"][heads[j] : heads[j + 1]]]
        below = step * np.cumsum([0, *row["head_steps"][steps[j] : steps[j + 1]]])[: len(ids)]
        highest = logp[ids].max(initial=-np.inf)
        result["head"] = max(result["head"], float(np.abs(highest - below - logp[ids]).max(initial=0)))
        result["mass"] = max(result["mass"], abs(row["tail_mass"][j] - (1 - np.exp(logp[ids]).sum())))
        result["label"] = max(result["label"], abs(row["label_logprob"][j] - logp[labels[j]]))
        wrong = np.setxor1d(ids, np.flatnonzero(logp >= np.log(tau)))
        result["edge"] = max(result["edge"], float(np.abs(logp[wrong] - np.log(tau)).max(initial=0)))
        tail = np.exp(logp)
        tail[ids] = 0
        drawn = np.zeros(len(tail))
        drawn[by_rank[np.cumsum(row["tail_gaps"][tails[j] : tails[j + 1]], dtype=np.int64)]] = tau
        result["count"] = max(result["count"], abs(drawn.sum() - tail.sum()) / tau)
        result["squared"] += float(((drawn - tail) ** 2).sum())
        result["expected"] += float((tail * (tau - tail)).sum())
    return result


def report(found: list[dict[str, Any]], metadata: dict[str, Any]) -> None:
    """Print the differences; AssertionError if one is larger than rounding and sampling explain."""
    labels = sum(result["labels"] for result in found)
    worst = {name: max(result[name] for result in found) for name in ("head", "label", "mass", "edge", "count")}
    squared, expected = (sum(result[name] for result in found) for name in ("squared", "expected"))
    print(f"{len(found)} sequences, {labels} labels")
    print(f"head log-probabilities: off by at most {worst['head']:.5f} nats, half a step is {metadata['step'] / 2:.5f}")
    print(f"label log-probabilities: off by at most {worst['label']:.5f} nats, half a grid step is {1 / 32:.5f}")
    print(f"tail mass: off by at most {worst['mass']:.5f}, half a grid step is {1 / 510:.5f}")
    print(f"tokens on the wrong side of tau: within {worst['edge']:.1e} nats of it")
    print(f"tail entries: the mass is off by at most {worst['count']:.4f} of one entry")
    print(f"tail squared error: {squared / labels:.5f} per label, {expected / labels:.5f} expected")
    assert worst["head"] <= metadata["step"] / 2 + 1e-3
    assert worst["label"] <= 1 / 32 + 1e-3
    assert worst["mass"] <= 1 / 510 + 1e-4
    assert worst["edge"] <= 1e-3
    assert worst["count"] <= 1 + 1e-3
    # A label's squared error lies between 0 and (1/tau + 1) tau^2 + tau, and labels draw independently: Hoeffding's
    # inequality, with a failure once in 10^6.
    tau = metadata["tau"]
    widest = (1 / tau + 1) * tau**2 + tau
    assert abs(squared - expected) / labels <= widest * np.sqrt(np.log(2e6) / (2 * labels))


if __name__ == "__main__":
    main()
