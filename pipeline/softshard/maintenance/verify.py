"""Verifying an output: corpus, adapters and targets, each against its own records.

Reads only, without a model or a lease. Findings are listed by file; `softshard repair` repairs them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from softshard.corpus.manifest import CorpusManifest
from softshard.corpus.verify import CorpusVerification, find_corpus_orphans, verify_corpus
from softshard.finetune.record import Trained, TrainingReceipt
from softshard.output.status import job_values
from softshard.pilot.measure import Pilot
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.manifest import Manifest, manifest_path
from softshard.shard.orphans import Orphan
from softshard.shard.verify import Finding, Verification, verify_targets
from softshard.storage import Store, open_store
from softshard.teacher.record import AdapterReceipt
from softshard.telemetry import Reporter

__all__ = ["CORPORA", "Checked", "OutputVerification", "check_output", "verify_output"]

Record = TypeVar("Record", bound=BaseModel)
CORPORA = ("corpus", "retention")
_RECEIPTS: Mapping[str, type[AdapterReceipt] | type[TrainingReceipt]] = {
    "teacher": AdapterReceipt,
    "adapter": TrainingReceipt,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """The findings in each folder of an output."""

    targets: Verification
    corpora: Mapping[str, CorpusVerification]
    """For the corpus and for the retention text."""
    adapters: Mapping[str, tuple[Finding, ...]]
    """For the adapters of the style teacher and of the student."""
    num_adapters: int

    @property
    def findings(self) -> dict[str, tuple[Finding, ...]]:
        """By folder; the paths of the findings are relative to it."""
        corpora = {name: corpus.findings for name, corpus in self.corpora.items()}
        return {**corpora, **self.adapters, "targets": self.targets.findings}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputVerification:
    """What was checked in an output, and the problems that were found."""

    num_parts: int
    num_sequences: int
    num_labels: int
    num_bytes: int
    num_slices: int
    num_adapters: int
    deep: bool
    problems: tuple[str, ...]
    """One line for each problem, which names the file; empty where there is none."""
    notes: tuple[str, ...]
    """Remarks that are not problems."""
    unnamed: tuple[Orphan, ...]
    """Files that no manifest in use names, below the output folder."""


def check_output(
    store: Store, *, deep: bool = False, on_part: Callable[[int, int], None] = lambda done, total: None
) -> Checked:
    """Verify each folder of an output."""
    adapters = {name: _check_adapters(store, name, kind) for name, kind in _RECEIPTS.items()}
    targets = verify_targets(store.below("targets"), deep=deep, on_part=on_part)
    lost = _lost_adapters(store, targets.manifest) if targets.manifest else ()
    pilots = (path for path in store.list("targets/pilot") if path.endswith(".json"))
    found = [(path, problem) for path in pilots if (problem := _parsed(store, path, Pilot)[1])]
    return Checked(
        targets=replace(targets, findings=targets.findings + _findings(store, "targets", found)),
        corpora={name: verify_corpus(store.below(name), deep=deep) for name in CORPORA},
        adapters={name: found + (lost if name == "teacher" else ()) for name, (_, found) in adapters.items()},
        num_adapters=sum(count for count, _ in adapters.values()),
    )


def verify_output(out: str, reporter: Reporter, *, deep: bool) -> OutputVerification:
    """Verify an output. Raises JobInvalid if it holds no job."""
    store = open_store(out)
    job_values(store)
    with reporter.progress("verify", total=None, unit="parts") as progress:
        checked = check_output(store, deep=deep, on_part=lambda done, total: progress(done, total=total))
    targets = checked.targets
    unnamed = [_below("targets", orphan) for orphan in targets.unnamed]
    for name, found in checked.corpora.items():
        unnamed += [_below(name, orphan) for orphan in find_corpus_orphans(store.below(name), found.manifest)]
    manifest, corpus = targets.manifest, checked.corpora["corpus"].manifest
    is_of_another = manifest and corpus and manifest.corpus != corpus.digest
    mismatches = _compare(manifest, corpus, store.uri) if manifest and corpus and not is_of_another else []
    problems = [finding.problem for findings in checked.findings.values() for finding in findings]
    return OutputVerification(
        num_parts=targets.num_parts,
        num_sequences=targets.num_sequences,
        num_labels=targets.num_labels,
        num_bytes=targets.num_bytes,
        num_slices=sum(len(found.manifest.slices) for found in checked.corpora.values() if found.manifest),
        num_adapters=checked.num_adapters,
        deep=deep,
        problems=(*problems, *mismatches),
        notes=("the targets were made from an earlier corpus than the present one; run the job",)
        if is_of_another
        else (),
        unnamed=tuple(unnamed),
    )


def _below(folder: str, orphan: Orphan) -> Orphan:
    return replace(orphan, path=f"{folder}/{orphan.path}")


def _check_adapters(
    store: Store, folder: str, kind: type[AdapterReceipt] | type[TrainingReceipt]
) -> tuple[int, tuple[Finding, ...]]:
    """The number of complete adapters in a folder of an output, and the findings."""
    receipts = [path for path in store.list(folder) if re.fullmatch(r"[^/]+/[^/]+/receipt\.json", path)]
    found: list[tuple[str, str]] = []
    for path in receipts:
        receipt, problem = _parsed(store, path, kind)
        found += [(path, problem)] if problem else []
        for name, sha256 in receipt.files.items() if receipt else ():
            file = f"{path.removesuffix('/receipt.json')}/{name}"
            found += [(file, problem) for problem in _check_file(store, file, sha256)]
    pointer = f"{folder}/adapter.json"
    if kind is TrainingReceipt and store.exists(pointer) and (problem := _parsed(store, pointer, Trained)[1]):
        found.append((pointer, problem))
    return len(receipts), _findings(store, folder, found)


def _lost_adapters(store: Store, manifest: Manifest) -> tuple[Finding, ...]:
    """Adapters that a manifest of targets names by digest and that have no receipt."""
    paths = [
        path
        for path in store.list("teacher")
        if re.fullmatch(r"fold-[^/]+/receipt\.json", path.removeprefix("teacher/"))
    ]
    receipts = (_parsed(store, path, AdapterReceipt)[0] for path in paths)
    there = {(receipt.fold, receipt.digest) for receipt in receipts if receipt is not None}
    found = [
        (f"teacher/fold-{fold}", f"adapter {digest[:16]}, with which the targets were made, is missing")
        for fold, digest in enumerate(manifest.teacher.get("adapters", []))
        if (fold, digest) not in there
    ]
    return _findings(store, "teacher", found)


def _findings(store: Store, folder: str, found: Iterable[tuple[str, str]]) -> tuple[Finding, ...]:
    """Findings in a folder of an output, from paths below the output and problems."""
    return tuple(
        Finding(path=path.removeprefix(f"{folder}/"), problem=f"{store.uri}/{path}: {problem}")
        for path, problem in found
    )


def _parsed(store: Store, path: str, kind: type[Record]) -> tuple[Record | None, str | None]:
    """A record, and the problem with it, if any."""
    try:
        content = store.read(path)
        record = kind.model_validate_json(content)
    except ValidationError as error:
        return None, f"cannot be read: {error.errors()[0]['msg']}"
    except OSError as error:
        return None, f"cannot be read: {error}"
    if content != canonical_json(record):
        return record, "has the right content, but not the bytes that were written"
    return record, None


def _check_file(store: Store, path: str, sha256: str) -> list[str]:
    try:
        digest = sha256_hex(store.read(path))
    except FileNotFoundError:
        return ["is missing"]
    except OSError as error:
        return [f"cannot be read: {error}"]
    return [] if digest == sha256 else [f"has sha256 {digest[:16]}, its receipt names {sha256[:16]}"]


def _compare(manifest: Manifest, corpus: CorpusManifest, uri: str) -> list[str]:
    """Problems where the parts of a manifest are not those of its own corpus."""

    def place(slice_sha256: str, split: str, fold: int, num_sequences: int, num_labels: int) -> str:
        return f"slice {slice_sha256[:16]}, {split}, fold {fold}: {num_sequences} sequences, {num_labels} labels"

    named = [place(r.slice, r.split, r.fold, r.num_sequences, r.num_labels) for r in manifest.parts]
    there = [place(s.sha256, s.split, s.fold, s.num_sequences, s.num_labels) for s in corpus.slices]
    file = f"{uri}/targets/{manifest_path(manifest.digest)}"
    return [
        f"{file}: part {number} is of {part or 'nothing'}, the corpus has {expected or 'nothing'} there"
        for number, (part, expected) in enumerate(itertools.zip_longest(named, there))
        if part != expected
    ]
