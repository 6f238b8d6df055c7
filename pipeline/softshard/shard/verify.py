"""Compares a `targets/` folder with its manifest and receipts.

Every part is read and hashed, and its Parquet footer is compared with its receipt and the manifest; `deep` decodes
every sketch and checks its mass. Findings are collected and not raised, so that one bad part does not hide another.
Manifest, pointer and receipts are compared byte by byte, so every flipped bit in them is found.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow.parquet as pq

from softshard.errors import ManifestMissing, PartCorrupt
from softshard.records.canonical import canonical_json
from softshard.shard.commit import receipt_path
from softshard.shard.decode import Decoder, open_part
from softshard.shard.files import check_size, parquet_errors
from softshard.shard.manifest import Manifest, Receipt, make_pointer, manifest_path, read_manifest, read_receipt
from softshard.shard.orphans import Orphan, find_orphans
from softshard.shard.read import read_part
from softshard.shard.schema import PartMetadata
from softshard.shard.validation import find_impossible
from softshard.storage import Store

__all__ = ["Finding", "Verification", "verify_targets"]

_ROWS_AT_ONCE = 64
_AT_ONCE = 4
"""Parts that are in memory and checked at the same time. Reading, hashing and most of decoding run in parallel."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """A file that is missing, damaged or wrong."""

    path: str
    """Path below the folder that was verified."""
    problem: str
    """One line, which begins with the file's URI."""
    part_id: str | None = None
    """Id of the part whose data or receipt the file is; None for other files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was checked, and what is wrong."""

    manifest: Manifest | None
    """None when there is none or when it cannot be read, which is a finding."""
    num_parts: int
    num_sequences: int
    num_labels: int
    num_bytes: int
    deep: bool
    findings: tuple[Finding, ...]
    """Empty when everything is right."""
    unnamed: tuple[Orphan, ...]
    """Files that the manifest does not name, from earlier settings or a run that was stopped; no reader opens them."""

    @property
    def problems(self) -> tuple[str, ...]:
        """One line per finding; empty when everything is right."""
        return tuple(finding.problem for finding in self.findings)


def verify_targets(
    store: Store, *, deep: bool = False, on_part: Callable[[int, int], None] = lambda done, total: None
) -> Verification:
    """Verify a `targets/` folder against its manifest, or without a manifest against its receipts."""
    manifest, findings = _read_manifest(store)
    receipts: Collection[Receipt] = manifest.parts if manifest else _receipts(store, findings)
    named = {manifest_path(manifest.digest)} if manifest else set()
    sums = Counter[str]()
    for done, (receipt, found) in enumerate(_checked(store, receipts, manifest, deep=deep)):
        on_part(done, len(receipts))
        findings += found
        named |= {receipt.path, receipt_path(receipt.part_id)}
        for name in ("num_sequences", "num_labels", "num_bytes"):
            sums[name] += getattr(receipt, name)
    on_part(len(receipts), len(receipts))
    return Verification(
        manifest=manifest,
        num_parts=len(receipts),
        num_sequences=sums["num_sequences"],
        num_labels=sums["num_labels"],
        num_bytes=sums["num_bytes"],
        deep=deep,
        findings=tuple(findings),
        unnamed=find_orphans(store, named),
    )


def _read_manifest(store: Store) -> tuple[Manifest | None, list[Finding]]:
    try:
        manifest = read_manifest(store)
    except PartCorrupt as error:
        return None, [Finding(path=error.uri.removeprefix(f"{store.uri}/"), problem=str(error))]
    except (ManifestMissing, OSError) as error:
        return None, [Finding(path="manifest.json", problem=_line(store, "manifest.json", error))]
    findings = []
    digest = manifest.digest
    # A number has more than one decimal form, so the digest of the parsed manifest does not cover every bit of it.
    for name, expected in (("manifest.json", make_pointer(digest)), (manifest_path(digest), canonical_json(manifest))):
        if store.read(name) != expected:
            problem = f"{store.uri}/{name}: has the right content, but not the bytes that were written"
            findings.append(Finding(path=name, problem=problem))
    return manifest, findings


def _line(store: Store, path: str, error: Exception) -> str:
    return f"{store.uri}/{path}: cannot be read: {error}" if isinstance(error, OSError) else str(error)


def _receipts(store: Store, findings: list[Finding]) -> list[Receipt]:
    receipts = []
    for path in store.list("receipts"):
        try:
            receipt = read_receipt(store, path)
        except (PartCorrupt, OSError) as error:
            findings.append(Finding(path=path, problem=_line(store, path, error)))
            continue
        if path == receipt_path(receipt.part_id):
            receipts.append(receipt)
        else:
            problem = f"{store.uri}/{path}: is the receipt of part {receipt.part_id}"
            findings.append(Finding(path=path, problem=problem))
    return receipts


def _checked(
    store: Store, receipts: Iterable[Receipt], manifest: Manifest | None, *, deep: bool
) -> Iterator[tuple[Receipt, list[Finding]]]:
    """Each receipt with its findings and those of its part, in order; a few parts are checked at a time."""

    def check(receipt: Receipt) -> tuple[Receipt, list[Finding]]:
        findings = _check_receipt(store, receipt) if manifest else []
        return receipt, findings + _check_part(store, receipt, manifest, deep=deep)

    waiting = iter(receipts)
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="softshard-verify") as threads:
        running = deque(threads.submit(check, receipt) for receipt in itertools.islice(waiting, _AT_ONCE))
        while running:
            done = running.popleft().result()
            running.extend(threads.submit(check, receipt) for receipt in itertools.islice(waiting, 1))
            yield done


def _check_receipt(store: Store, receipt: Receipt) -> list[Finding]:
    path = receipt_path(receipt.part_id)
    try:
        if store.read(path) == canonical_json(receipt):
            return []
        problem = f"{store.uri}/{path}: the receipt is not the one that the manifest names"
    except FileNotFoundError:
        problem = f"{store.uri}/{path}: the receipt is missing"
    except OSError as error:
        problem = _line(store, path, error)
    return [Finding(path=path, problem=problem, part_id=receipt.part_id)]


def _check_part(store: Store, receipt: Receipt, manifest: Manifest | None, *, deep: bool) -> list[Finding]:
    uri = f"{store.uri}/{receipt.path}"
    try:
        # Checked before reading: a file in the place of a part can be of any size.
        check_size(store.size(receipt.path), expected=receipt.num_bytes, uri=uri)
        file, metadata = open_part(read_part(store, receipt), uri=uri)
        problems = _check_footer(file, metadata, receipt)
        if manifest:
            problems += _check_metadata(metadata, manifest)
        if deep:
            problems += _check_rows(file, metadata, receipt, uri=uri)
        lines = [f"{uri}: {problem}" for problem in problems]
    except FileNotFoundError:
        lines = [f"{uri}: is missing"]
    except (PartCorrupt, OSError) as error:
        lines = [_line(store, receipt.path, error)]
    return [Finding(path=receipt.path, problem=line, part_id=receipt.part_id) for line in lines]


def _check_footer(file: pq.ParquetFile, metadata: PartMetadata, receipt: Receipt) -> list[str]:
    """Compare the footer with the receipt. Every sequence has a label, so the values of a column are the labels."""
    problems = []
    if metadata.part_id != receipt.part_id:
        problems.append(f"says it is part {metadata.part_id}, its receipt says {receipt.part_id}")
    if not receipt.path.startswith(f"data/{receipt.split}/"):
        problems.append(f"is outside the folder of its split, {receipt.split}")
    names = [file.schema.column(index).path for index in range(len(file.schema))]
    column = names.index("label_logprob.list.element")
    groups = (file.metadata.row_group(index) for index in range(file.num_row_groups))
    labels = sum(group.column(column).num_values for group in groups)
    if (file.metadata.num_rows, labels) != (receipt.num_sequences, receipt.num_labels):
        seen = f"has {file.metadata.num_rows} rows and {labels} labels"
        problems.append(f"{seen}, its receipt says {receipt.num_sequences} and {receipt.num_labels}")
    return problems


def _check_metadata(metadata: PartMetadata, manifest: Manifest) -> list[str]:
    problems = []
    for name in ("schema_version", "tokenizer_fingerprint", "vocab_size", "seed"):
        if getattr(metadata, name) != getattr(manifest, name):
            problems.append(f"its {name.replace('_', ' ')} is not the manifest's")
    for name in ("kind", "tau", "draws", "k", "step", "temperature"):
        if name in manifest.target and getattr(metadata, name) != manifest.target[name]:
            problems.append(f"has {name} {getattr(metadata, name)}, the manifest says {manifest.target[name]}")
    return problems


def _check_rows(file: pq.ParquetFile, metadata: PartMetadata, receipt: Receipt, *, uri: str) -> list[str]:
    """Decode every sketch. Raises PartCorrupt where that cannot be done."""
    problems: list[str] = []
    heads = tails = 0
    decoder = Decoder(metadata, uri=uri)
    with parquet_errors(uri):
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
            if batch.column("fold").to_pylist() != [receipt.fold] * batch.num_rows:
                problems.append(f"has rows of another fold than {receipt.fold}, which its receipt names")
            draws = [decoder.block(batch, draw=draw) for draw in range(metadata.draws)]
            heads += len(draws[0].targets.head_ids)
            tails += sum(len(block.targets.tail_ids) for block in draws)
            sequence_ids = batch.column("sequence_id").to_pylist()
            problems += find_impossible(draws, sequence_ids=sequence_ids, metadata=metadata)
    if (heads, tails) != (receipt.num_head_entries, receipt.num_tail_entries):
        said = f"{receipt.num_head_entries} and {receipt.num_tail_entries}"
        problems.append(f"has {heads} head and {tails} tail entries, its receipt says {said}")
    return problems
