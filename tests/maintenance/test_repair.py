"""Repair: exactly what is bad or missing is made again, to the same bytes, and nothing else is touched."""

import json
import shutil

import pytest
import yaml

from fakes.outputs import tree
from softshard.cli import main
from softshard.cluster import cluster
from softshard.corpus.manifest import read_corpus_manifest
from softshard.errors import NotRepairable, TryAgain
from softshard.maintenance import repair_targets as mending
from softshard.maintenance.repair import repair
from softshard.maintenance.verify import verify_output
from softshard.output.lease import Pace, hold_lease
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.commit import receipt_path
from softshard.shard.manifest import read_manifest, write_manifest
from softshard.storage import LocalStore
from softshard.telemetry import SilentReporter

NOWHERE = "tcp://127.0.0.1:9"
STAGES = ("corpus", "retention", "teacher", "targets")


@pytest.fixture
def out(finished, tmp_path):
    """A copy of a finished output that can reach no cluster: what is computed there is an error."""
    shutil.copytree(finished, tmp_path / "out")
    change_job(tmp_path / "out", cluster={"scheduler": NOWHERE})
    return tmp_path / "out"


@pytest.fixture
def reachable(out, scheduler):
    """The same, with a cluster."""
    change_job(out, cluster={"scheduler": scheduler})
    return out


def change_job(out, **sections):
    job = yaml.safe_load((out / "job.yaml").read_text())
    job["out"] = str(out)
    for name, values in sections.items():
        job[name] = {**job[name], **values} if isinstance(values, dict) else values
    (out / "job.yaml").write_text(yaml.safe_dump(job, sort_keys=False))


def mend(out):
    return repair(str(out), SilentReporter(), deep=False)


def places(out):
    """What shows whether a file was touched."""
    found = [path for stage in STAGES for path in (out / stage).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 16
    path.write_bytes(content)


def find_problems(out):
    return verify_output(str(out), SilentReporter(), deep=True).problems


def test_bad_and_missing_parts_are_computed_to_the_same_bytes_and_the_others_are_not_touched(finished, reachable):
    """A flipped bit, a truncated part, a lost one with its receipt, two that changed places, and a good one."""
    targets = reachable / "targets"
    parts = read_manifest(targets).parts
    assert len(parts) >= 6
    paths = [targets / part.path for part in parts]
    flip(paths[0])
    paths[1].write_bytes(paths[1].read_bytes()[:-7])
    paths[2].unlink()
    (targets / receipt_path(parts[2].part_id)).unlink()
    swapped = paths[3].read_bytes(), paths[4].read_bytes()
    paths[4].write_bytes(swapped[0])
    paths[3].write_bytes(swapped[1])
    before = places(reachable)
    repaired = mend(reachable)
    assert tree(reachable, of=STAGES) == tree(finished, of=STAGES)
    assert sorted(repaired.made) == sorted(f"targets/{part.path}" for part in parts[:5])
    assert repaired.manifest == repaired.manifest_before
    after = places(reachable)
    made = {f"targets/{name}" for part in parts[:5] for name in (part.path, receipt_path(part.part_id))}
    assert {name for name in after if after[name] != before.get(name)} == made
    assert find_problems(reachable) == ()
    aside = [reachable / path for path in repaired.set_aside if path.endswith(tuple(".0123456789abcdef"))]
    assert {sha256_hex(swapped[0]), sha256_hex(swapped[1])} <= {sha256_hex(path.read_bytes()) for path in aside}


def test_records_are_written_again_from_the_manifest_and_nothing_is_computed(finished, out):
    """Receipts that are lost, cut short, or of another part, and a manifest in other bytes; the cluster is nowhere."""
    targets = out / "targets"
    first, second, third, *_ = read_manifest(targets).parts
    (targets / receipt_path(first.part_id)).unlink()
    (targets / receipt_path(second.part_id)).write_bytes(b"{")
    (targets / receipt_path(third.part_id)).write_bytes(canonical_json(first))
    manifest = next((targets / "manifests").iterdir())
    manifest.write_text(manifest.read_text() + " ")
    repaired = mend(out)
    assert tree(out, of=STAGES) == tree(finished, of=STAGES)
    assert len(repaired.made) == 4
    assert len(repaired.set_aside) == 3


def test_without_a_manifest_what_is_committed_is_kept_and_the_rest_is_computed(finished, reachable):
    """The manifest is damaged, one part and one receipt are, and one part lost its receipt."""
    targets = reachable / "targets"
    parts = read_manifest(targets).parts
    flip(next((targets / "manifests").iterdir()))
    flip(targets / parts[0].path)
    (targets / receipt_path(parts[1].part_id)).write_bytes(b"\x00")
    (targets / receipt_path(parts[2].part_id)).unlink()
    flip(targets / parts[2].path)
    before = places(reachable)
    repaired = mend(reachable)
    assert tree(reachable, of=STAGES) == tree(finished, of=STAGES)
    assert repaired.manifest_before is None
    after = places(reachable)
    for part in parts[3:]:
        for name in (f"targets/{part.path}", f"targets/{receipt_path(part.part_id)}"):
            assert after[name] == before[name]


def test_without_a_cluster_nothing_is_touched(out, monkeypatch):
    monkeypatch.setattr(cluster, "_SECONDS_TO_CONNECT", 1)
    flip(out / "targets" / read_manifest(out / "targets").parts[0].path)
    before = places(out)
    with pytest.raises(TryAgain, match="no Dask scheduler answers"):
        mend(out)
    assert places(out) == before


def test_repair_that_was_stopped_is_taken_up(finished, reachable, monkeypatch):
    """The bad part is set aside, then the scheduler is lost; nothing else is gone, and the next repair ends it."""

    def lost(*arguments, **options):
        raise TryAgain("the scheduler is lost")

    part = read_manifest(reachable / "targets").parts[0]
    flip(reachable / "targets" / part.path)
    with monkeypatch.context() as broken:
        broken.setattr(mending, "score_parts", lost)
        with pytest.raises(TryAgain):
            mend(reachable)
    assert not (reachable / "targets" / part.path).exists()
    mend(reachable)
    assert tree(reachable, of=STAGES) == tree(finished, of=STAGES)


def test_part_that_comes_out_otherwise_gets_a_new_manifest_and_that_is_said(reachable, capsys):
    """As with an engine that batches as it likes: the bytes that were committed are not those that are computed now."""
    store = LocalStore(reachable / "targets")
    manifest = read_manifest(store)
    part = manifest.parts[0]
    path = reachable / "targets" / part.path
    true_bytes = path.read_bytes()
    path.write_bytes(b"what that engine had given")
    other = part.model_copy(update={"sha256": sha256_hex(path.read_bytes()), "num_bytes": path.stat().st_size})
    store.replace(receipt_path(part.part_id), canonical_json(other))
    parts = [other, *manifest.parts[1:]]
    write_manifest(store, type(manifest).model_validate({**manifest.model_dump(), "parts": parts}))
    before = read_manifest(store).digest
    assert main(["repair", str(reachable), "--quiet"]) == 0
    assert f"was {before[:16]}" in capsys.readouterr().out
    assert path.read_bytes() == true_bytes
    assert read_manifest(store) == manifest
    assert find_problems(reachable) == ()


def test_bad_slices_are_cut_again_from_the_sources(finished, out):
    corpus = read_corpus_manifest(LocalStore(out / "corpus"))
    flip(out / "corpus" / corpus.slices[1].path)
    (out / "corpus" / corpus.documents[0].path).unlink()
    flip(next((out / "retention/sequences").iterdir()))
    before = places(out)
    repaired = mend(out)
    assert tree(out, of=STAGES) == tree(finished, of=STAGES)
    assert len(repaired.made) == 3
    after = places(out)
    assert {name for name in after if after[name] != before.get(name)} == set(repaired.made)


def test_corpus_without_a_readable_manifest_is_made_whole_again(finished, out):
    (out / "corpus/manifest.json").write_text("{}")
    flip(next((out / "corpus/sequences").iterdir()))
    mend(out)
    assert tree(out, of=STAGES) == tree(finished, of=STAGES)


def test_slice_whose_source_has_changed_cannot_be_mended_and_nothing_is_touched(out, tmp_path):
    source = yaml.safe_load((out / "job.yaml").read_text())["corpus"]["sources"][0]
    (tmp_path / "other.jsonl").write_text('{"text": "Something else altogether.", "author": "x"}\n' * 2)
    source["uri"] = str(tmp_path / "other.jsonl")
    change_job(out, corpus={"sources": [source], "holdout_fraction": 0.0}, teacher={"folds": 0})
    flip(next((out / "corpus/sequences").iterdir()))
    before = places(out)
    with pytest.raises(NotRepairable, match=r"the sources, or the settings in job\.yaml, have changed"):
        mend(out)
    assert places(out) == before


def test_bad_adapter_of_the_teacher_is_trained_again_to_the_same_bytes(finished, reachable):
    flip(next((reachable / "teacher").glob("fold-1-*/adapter_model.safetensors")))
    repaired = mend(reachable)
    assert tree(reachable, of=STAGES) == tree(finished, of=STAGES)
    assert len(repaired.set_aside) == 2


def test_bad_adapter_of_the_student_is_left_to_the_next_run(out, capsys):
    path = next((out / "adapter").glob("baseline-*/adapter_model.safetensors"))
    flip(path)
    assert main(["repair", str(out), "--quiet"]) == 0
    assert f"left to `softshard run`, which trains it again: {path.relative_to(out)}" in capsys.readouterr().out
    assert not path.exists()
    assert not (path.parent / "receipt.json").exists()
    assert find_problems(out) == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": {"tau": 0.125}}, "made with target"),
        ({"teacher": {"batch_tokens": 1024}}, "made with batch_tokens 2048, now 1024"),
    ],
)
def test_part_that_would_be_another_now_is_left_as_it_is_and_the_reason_named(out, changes, said):
    change_job(out, **changes)
    part = read_manifest(out / "targets").parts[0]
    flip(out / "targets" / part.path)
    before = places(out)
    with pytest.raises(NotRepairable, match=said) as caught:
        mend(out)
    assert part.path in str(caught.value)
    assert places(out) == before


def test_whole_output_is_left_as_it_is(out, capsys):
    before = places(out)
    assert main(["repair", str(out), "--quiet", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["num_problems"], said["made"], said["set_aside"]) == (0, [], [])
    assert places(out) == before


def test_repair_waits_for_nobody_and_disturbs_nobody(out, capsys):
    flip(out / "targets" / read_manifest(out / "targets").parts[0].path)
    before = places(out)
    with hold_lease(LocalStore(out), job="tiny", run="r", pace=Pace(interval_seconds=0.05, expiry_seconds=5)):
        assert main(["repair", str(out), "--quiet"]) == 75
    assert "run r of job 'tiny'" in capsys.readouterr().err
    assert places(out) == before
