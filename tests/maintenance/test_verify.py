"""Verification: a flipped bit anywhere is found and named, each folder is held against its record, and what no manifest
names is told apart."""

import json
import random
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fakes.parts import committed
from softshard.cli import main
from softshard.corpus.manifest import read_corpus_manifest
from softshard.maintenance.verify import check_output, verify_output
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.commit import receipt_path
from softshard.shard.manifest import read_manifest, write_manifest
from softshard.shard.verify import verify_targets
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter


@pytest.fixture
def out(finished, tmp_path):
    """A copy of a finished output."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def verified(out, *, deep=False):
    return verify_output(str(out), SilentReporter(), deep=deep)


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_flipped_bit_anywhere_is_found_and_named(tmp_path):
    """400 random bits of parts, receipts, the manifest and the pointer to it, one at a time."""
    manifest = committed(LocalStore(tmp_path), seeds=(0, 1, 2))
    files = sorted(
        file
        for folder in ("data", "receipts", "manifests")
        for file in (tmp_path / folder).rglob("*")
        if file.is_file()
    )
    files.append(tmp_path / "manifest.json")
    assert len(files) == 2 * len(manifest.parts) + 2
    generator = random.Random(5)
    for _ in range(400):
        file = generator.choice(files)
        before = file.read_bytes()
        flip(file, generator.randrange(8 * len(before)))
        problems = verify_targets(LocalStore(tmp_path)).problems
        file.write_bytes(before)
        # A pointer with a flipped digit points at a manifest that is not there, which is what is said then.
        about = "manifest" if file.name == "manifest.json" else file.name
        assert any(about in problem for problem in problems), (file, problems)
    assert verify_targets(LocalStore(tmp_path)).problems == ()


def test_a_flipped_bit_of_the_corpus_and_of_an_adapter_is_found_and_named(out):
    generator = random.Random(6)
    names = [
        path.relative_to(out)
        for name in ("corpus", "retention", "teacher", "adapter")
        for path in (out / name).rglob("*")
    ]
    files = sorted(name for name in names if (out / name).suffix in {".parquet", ".safetensors"})
    assert len(files) > 10
    for name in generator.sample(files, 10):
        before = (out / name).read_bytes()
        flip(out / name, generator.randrange(8 * len(before)))
        findings = [problem for found in check_output(LocalStore(out)).findings.values() for problem in found]
        (out / name).write_bytes(before)
        assert len(findings) == 1
        assert str(out / name) in findings[0].problem


def test_a_digit_that_changes_no_number_is_found_in_a_manifest(tmp_path):
    """Many decimals stand for one number, so what is parsed, and its digest, can stay as they were."""
    committed(LocalStore(tmp_path))
    path = next((tmp_path / "manifests").iterdir())
    text = path.read_text()
    values = json.loads(text)

    def same_number_in_other_digits():
        for number in {part["label_logprob_sum"] for part in values["parts"]} | set(values["fidelity"].values()):
            if isinstance(number, float):
                yield repr(number), f"{number:.25g}"

    shown, longer = next((a, b) for a, b in same_number_in_other_digits() if a != b and float(a) == float(b))
    path.write_text(text.replace(shown, longer))
    assert read_manifest(tmp_path)
    (problem,) = verify_targets(LocalStore(tmp_path)).problems
    assert str(path) in problem


def rewritten(store, manifest, part, change, *, update=None):
    """A part whose table is changed, with a receipt and a manifest that vouch for the new bytes."""
    path = store.local_path(part.path)
    table = change(pq.read_table(path))
    pq.write_table(table, path)
    content = path.read_bytes()
    receipt = part.model_copy(update={"sha256": sha256_hex(content), "num_bytes": len(content), **(update or {})})
    store.replace(receipt_path(part.part_id), canonical_json(receipt))
    others = [receipt if other.part_id == part.part_id else other for other in manifest.parts]
    write_manifest(store, type(manifest).model_validate({**manifest.model_dump(), "parts": others}))


def without_last_row(table):
    return table.slice(0, table.num_rows - 1)


def other_type(table):
    return table.set_column(table.schema.get_field_index("start"), "start", table.column("start").cast(pa.int64()))


def other_fold(table):
    folds = pa.array(np.full(table.num_rows, 7, np.int16))
    return table.set_column(table.schema.get_field_index("fold"), table.schema.field("fold"), folds)


@pytest.mark.parametrize(
    ("change", "update", "deep", "said"),
    [
        (without_last_row, {}, False, "rows and .* labels, its receipt says 5 and"),
        (other_type, {}, False, "its columns are not those of schema version 1"),
        (lambda table: table.drop_columns("group"), {}, False, "its columns are not those of schema version 1"),
        (lambda table: table, {"split": "test"}, False, "outside the folder of its split, test"),
        (other_fold, {}, True, "rows of another fold than 0"),
        (lambda table: table, {"num_head_entries": 1}, True, "head and .* tail entries, its receipt says 1 and"),
    ],
)
def test_what_a_hash_cannot_see_is_held_against_the_receipt(tmp_path, change, update, deep, said):
    store = LocalStore(tmp_path)
    manifest = committed(store)
    part = manifest.parts[0]
    rewritten(store, manifest, part, change, update=update)
    problems = verify_targets(store, deep=deep).problems
    assert any(part.path in problem and re.search(said, problem) for problem in problems)
    if deep:
        assert verify_targets(store).problems == ()


def test_parts_that_are_not_those_of_the_corpus_are_found(out):
    """Two receipts that changed places: every file is what it was, but the order is not the corpus's."""
    store = LocalStore(out / "targets")
    manifest = read_manifest(store)
    first, second, *rest = manifest.parts
    write_manifest(store, type(manifest).model_validate({**manifest.model_dump(), "parts": [second, first, *rest]}))
    problems = verified(out).problems
    assert len(problems) == 2
    assert "part 0 is of slice" in problems[0]


def test_targets_of_an_earlier_corpus_are_a_note_and_no_problem(out):
    corpus = out / "corpus/manifest.json"
    corpus.write_text(corpus.read_text().replace('"seed": 0', '"seed": 1'))
    verification = verified(out)
    assert verification.problems == ()
    assert "earlier corpus" in verification.notes[0]


def kinds_of(out):
    return {orphan.path: orphan.kind for orphan in verified(out).unnamed}


def test_what_no_manifest_names_is_told_apart(out):
    """Of each kind one, beside a finished run."""
    targets = LocalStore(out / "targets")
    manifest = read_manifest(targets)
    part = manifest.parts[0]
    content = targets.read(part.path)
    ids = [f"{number:032x}" for number in range(1, 4)]
    targets.put_once("data/train/part-00000-uncommitted.parquet", content)
    committed_too = part.model_copy(
        update={"part_id": ids[0], "path": "data/train/part-00000-of-a-stopped-run.parquet"}
    )
    targets.put_once(committed_too.path, content)
    targets.put_once(receipt_path(ids[0]), canonical_json(committed_too))
    lost = part.model_copy(update={"part_id": ids[1], "path": "data/train/part-00000-lost.parquet"})
    targets.put_once(receipt_path(ids[1]), canonical_json(lost))
    targets.put_once(receipt_path(ids[2]), b"{}")
    targets.put_once(f"manifests/{'0' * 64}.json", b"{}")
    LocalStore(out / "corpus").put_once("sequences/train-0-earlier.parquet", b"of an earlier corpus")
    assert kinds_of(out) == {
        "targets/data/train/part-00000-uncommitted.parquet": "part without a receipt",
        "targets/data/train/part-00000-of-a-stopped-run.parquet": "committed, but in no manifest",
        f"targets/receipts/{ids[0]}.json": "committed, but in no manifest",
        f"targets/receipts/{ids[1]}.json": "receipt without its part",
        f"targets/receipts/{ids[2]}.json": "damaged receipt",
        f"targets/manifests/{'0' * 64}.json": "damaged manifest",
        "corpus/sequences/train-0-earlier.parquet": "slice of no corpus",
    }
    assert verified(out).problems == ()


def test_parts_of_an_older_manifest_are_told_apart(out):
    targets = LocalStore(out / "targets")
    manifest = read_manifest(targets)
    *kept, last = manifest.parts
    write_manifest(targets, type(manifest).model_validate({**manifest.model_dump(), "parts": kept}))
    assert {orphan.path: orphan.kind for orphan in verify_targets(targets).unnamed} == dict.fromkeys(
        (f"manifests/{manifest.digest}.json", last.path, receipt_path(last.part_id)), "of an older manifest"
    )


def test_each_folder_of_an_output_is_looked_at(out, capsys):
    """One file of each: the slice, the list of documents, the teacher's and the student's adapter, and the part."""
    corpus = read_corpus_manifest(LocalStore(out / "corpus"))
    damaged = [
        out / "corpus" / corpus.slices[0].path,
        out / "corpus" / corpus.documents[0].path,
        next((out / "retention/sequences").iterdir()),
        next((out / "teacher").glob("fold-0-*/adapter_model.safetensors")),
        next((out / "adapter").glob("baseline-*/adapter_model.safetensors")),
        out / "targets" / read_manifest(out / "targets").parts[0].path,
    ]
    for file in damaged:
        flip(file, 8 * (file.stat().st_size // 2))
    assert main(["verify", str(out), "--quiet", "--json"]) == 3
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert len(problems) == len(damaged)
    assert all(any(str(file) in problem for problem in problems) for file in damaged)


def test_verification_needs_no_lease_and_writes_nothing(out):
    (out / ".lease").mkdir(exist_ok=True)
    (out / ".lease/000001.json").write_text("{}")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert verified(out, deep=True).problems == ()
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
