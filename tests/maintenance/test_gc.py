"""Garbage: listed first, removed when asked, and never what a manifest names or a run may still want."""

import json
import shutil

import pytest

from fakes.outputs import tree
from softshard.cli import main
from softshard.maintenance.verify import verify_output
from softshard.output.lease import Pace, hold_lease
from softshard.records.canonical import canonical_json
from softshard.shard.commit import receipt_path
from softshard.shard.manifest import read_manifest, write_manifest
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter


@pytest.fixture
def out(finished, tmp_path):
    """A copy of a finished output."""
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


def litter(out):
    """One file of each kind that nobody names; their paths and sizes."""
    targets = LocalStore(out / "targets")
    part = read_manifest(targets).parts[0]
    stopped = part.model_copy(update={"part_id": "1" * 32, "path": "data/train/part-00000-stopped.parquet"})
    files = {
        "targets/data/train/part-00009-uncommitted.parquet": b"half a run",
        f"targets/{stopped.path}": b"committed by a run that was stopped",
        f"targets/{receipt_path(stopped.part_id)}": canonical_json(stopped),
        "corpus/sequences/train-0-earlier.parquet": b"earlier",
        ".tmp/job.yaml.0a": b"cut",
        "targets/.tmp/part.parquet.1b": b"cut off",
        ".quarantine/targets/data/train/part-00000.parquet.2c": b"damaged",
    }
    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return {name: len(content) for name, content in files.items()}


def collected(out, capsys, *options):
    assert main(["gc", str(out), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def files_of(out):
    return {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}


def test_what_no_manifest_names_is_listed_with_its_size_and_left(out, capsys):
    expected = litter(out)
    before = files_of(out)
    found = collected(out, capsys)
    assert {file["path"]: file["num_bytes"] for file in found["files"]} == expected
    assert found["num_bytes"] == sum(expected.values())
    assert found["removed"] is False
    assert files_of(out) == before


def test_with_yes_exactly_that_is_removed(finished, out, capsys):
    litter(out)
    assert collected(out, capsys, "--yes")["removed"] is True
    assert files_of(out) == files_of(finished)
    assert tree(out) == tree(finished)
    assert verify_output(str(out), SilentReporter(), deep=False).problems == ()
    assert main(["gc", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: every file is named by a manifest\n"


def with_older_manifest(out):
    """A manifest that lacks the last part, newer than the one that has it."""
    targets = LocalStore(out / "targets")
    older = read_manifest(targets)
    *parts, last = older.parts
    write_manifest(targets, type(older).model_validate({**older.model_dump(), "parts": parts}))
    return {f"targets/{name}" for name in (last.path, receipt_path(last.part_id), f"manifests/{older.digest}.json")}


def test_what_an_older_manifest_names_is_kept_unless_asked_for(out, capsys):
    older = with_older_manifest(out)
    assert collected(out, capsys, "--yes")["files"] == []
    assert older <= files_of(out)
    assert main(["gc", str(out)]) == 0
    assert "kept: 3 file(s)" in capsys.readouterr().out
    before = files_of(out)
    taken = collected(out, capsys, "--yes", "--older")
    assert {file["path"] for file in taken["files"]} == older
    assert files_of(out) == before - older


def test_what_a_run_has_committed_is_kept_while_there_is_no_manifest(out, capsys):
    (out / "targets/manifest.json").unlink()
    shutil.rmtree(out / "targets/manifests")
    (out / "targets/data/train/part-00009-uncommitted.parquet").write_bytes(b"half")
    before = files_of(out)
    collected(out, capsys, "--yes", "--older")
    assert before - files_of(out) == {"targets/data/train/part-00009-uncommitted.parquet"}


def test_nothing_is_removed_while_a_run_holds_the_lease(out, capsys):
    litter(out)
    with hold_lease(LocalStore(out), job="tiny", run="r", pace=Pace(interval_seconds=0.05, expiry_seconds=5)):
        before = files_of(out)
        assert main(["gc", str(out), "--yes"]) == 75
        assert "run r of job 'tiny'" in capsys.readouterr().err
        collected(out, capsys)
        assert {name for name in before if not name.startswith(".")} <= files_of(out)


def test_nothing_is_removed_where_the_manifest_cannot_be_read(out, capsys):
    litter(out)
    (out / "targets/manifest.json").write_text('{"manifest": "../../x", "digest": "../../x"}')
    before = files_of(out)
    assert main(["gc", str(out), "--yes"]) == 3
    assert str(out / "targets/manifest.json") in capsys.readouterr().err
    assert files_of(out) == before
