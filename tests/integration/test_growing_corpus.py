"""A corpus that has changed since the last run: what is new costs its own parts, and what was there stays as it is."""

import hashlib
import json
import math
import shutil

import polars as pl
import pyarrow.parquet as pq
import pytest

from fakes.events import Listener
from softshard.cli import main
from softshard.config.job_file import load_job
from softshard.corpus.manifest import read_corpus_manifest
from softshard.errors import NotRepairable
from softshard.maintenance.repair import repair
from softshard.maintenance.rescore import rescore
from softshard.maintenance.verify import verify_output
from softshard.records.canonical import canonical_json
from softshard.shard.decode import open_part
from softshard.shard.manifest import read_manifest
from softshard.stages.job import run_job
from softshard.storage import LocalStore
from softshard.teacher.record import AdapterReceipt
from softshard.telemetry import SilentReporter

STAGES = ("corpus", "teacher", "targets")
SEQUENCES_PER_PART = 4
NEW = range(91, 95)
"""One for the hold-out, one for fold 1, two for fold 0."""
SLICES_TO_FALL_INTO_STEP = 6
"""What `test_corpus_cut` bounds by 16 for the worst of 180 changes; the mean is less than 3."""


class Growing:
    """A job of two sources whose documents come and go; `here` is a folder of its own."""

    def __init__(self, here, tiny_job, texts, scheduler, *, folds):
        self.here, self.tiny_job, self.texts, self.scheduler, self.folds = here, tiny_job, texts, scheduler, folds
        self.out = here / "out"

    def write(self, name, numbers):
        """A file of documents; its folder is the source."""
        path = self.here / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": self.text(number)}) + "\n" for number in numbers))

    def text(self, number):
        return f"{self.texts[number % 12]} {self.texts[(5 * number + 3) % 12]} No. {number}."

    def job(self, *, teacher=None, **corpus):
        """Write the job file."""
        rights = {"style": "literary", "license": "CC0-1.0", "rights_basis": "owned"}
        sources = [{"name": name, "uri": str(self.here / name), **rights} for name in ("essays", "letters")]
        return self.tiny_job(
            self.here,
            corpus={"sources": sources, "sequences_per_part": SEQUENCES_PER_PART, **corpus},
            teacher={"folds": self.folds, **(teacher or {})},
            train={"retention": None},
            cluster={"scheduler": self.scheduler},
        )

    def run(self, **changes):
        """Run the job; what was said of the teacher."""
        reporter = Listener()
        run_job(load_job(self.job(**changes)), reporter, stages=STAGES)
        return [line for line in reporter.said if line.startswith("teacher: ")]

    def copy(self, here):
        shutil.copytree(self.here, here)
        return Growing(here, self.tiny_job, self.texts, self.scheduler, folds=self.folds)

    @property
    def parts(self):
        return {part.part_id: part for part in read_manifest(self.out / "targets").parts}

    @property
    def adapters(self):
        """Digests of the style teacher's, by fold."""
        return read_manifest(self.out / "targets").teacher["adapters"]

    def files(self, *folders):
        """When each file was written."""
        found = [path for folder in folders for path in (self.out / folder).rglob("*") if path.is_file()]
        return {path.relative_to(self.out).as_posix(): path.stat().st_mtime_ns for path in found}

    def documents(self):
        corpus = read_corpus_manifest(LocalStore(self.out / "corpus"))
        return pl.concat([pl.read_parquet(self.out / "corpus" / file.path) for file in corpus.documents])


def first_run(here, *made_of, folds):
    """A job that has run on 60 documents."""
    here.mkdir()
    growing = Growing(here, *made_of, folds=folds)
    growing.write("essays/2026-11-02.jsonl", range(40))
    growing.write("letters/2026-11-02.jsonl", range(40, 60))
    assert growing.run() == []
    return growing


@pytest.fixture(scope="module")
def plain_run(tiny_job, texts, scheduler, tmp_path_factory):
    """With the teacher as it is; not to be changed."""
    return first_run(tmp_path_factory.mktemp("plain") / "job", tiny_job, texts, scheduler, folds=0)


@pytest.fixture(scope="module")
def adapted_run(tiny_job, texts, scheduler, tmp_path_factory):
    """With a style teacher; not to be changed."""
    return first_run(tmp_path_factory.mktemp("adapted") / "job", tiny_job, texts, scheduler, folds=2)


@pytest.fixture
def plain(plain_run, tmp_path):
    return plain_run.copy(tmp_path / "job")


@pytest.fixture
def adapted(adapted_run, tmp_path):
    return adapted_run.copy(tmp_path / "job")


@pytest.fixture(params=["plain", "adapted"])
def growing(request):
    return request.getfixturevalue(request.param)


def in_hex(folder):
    """Ids of the documents that the adapter in a folder was trained on."""
    return set(pl.read_parquet(folder / "documents.parquet")["document_id"].bin.encode("hex"))


def assert_no_adapter_scores_what_it_has_trained_on(growing):
    """From the files alone: whom each part names, what those were trained on, and what the part holds."""
    receipts = [json.loads(path.read_text()) for path in (growing.out / "teacher").glob("fold-*/receipt.json")]
    folders = {receipt["digest"]: f"fold-{receipt['fold']}-{receipt['adapter_id'][:16]}" for receipt in receipts}
    learnt = {digest: in_hex(growing.out / "teacher" / folder) for digest, folder in folders.items()}
    there = set(growing.documents()["document_id"])
    num_scored = 0
    for part in growing.parts.values():
        _, metadata = open_part((growing.out / "targets" / part.path).read_bytes(), uri="part")
        held = set(pl.read_parquet(growing.out / "targets" / part.path)["document_id"])
        for digest in metadata.teacher["adapters"]:
            assert learnt[digest]
            assert not held & learnt[digest]
            assert learnt[digest] <= there, "text that the corpus no longer has"
            num_scored += 1
    assert num_scored > 30


def test_the_same_corpus_costs_nothing(growing):
    """The list of documents says where each lies, so it is rewritten."""
    parts, files = growing.parts, growing.files("corpus/sequences", "teacher", "targets/data", "targets/receipts")
    growing.write("essays/2026-11-02.jsonl", range(40))
    growing.run()
    assert growing.parts == parts
    assert growing.files("corpus/sequences", "teacher", "targets/data", "targets/receipts") == files


@pytest.mark.parametrize("file", ["essays/2026-11-01.jsonl", "essays/2026-11-03.jsonl", "letters/2026-11-03.jsonl"])
def test_new_documents_anywhere_cost_few_parts_and_leave_the_others_as_they_were(growing, file):
    """Where a split and fold has new sequences, these and some beside them until the cuts are in step again."""
    folders = ("corpus/sequences", "teacher", "targets/data", "targets/receipts")
    parts, files = growing.parts, growing.files(*folders)
    assert len(parts) > 50
    growing.write(file, NEW)
    said = growing.run()
    new = {part_id: part for part_id, part in growing.parts.items() if part_id not in parts}
    num_new = sum(part.num_sequences for part in growing.parts.values()) - sum(
        part.num_sequences for part in parts.values()
    )
    places = {(part.split, part.fold) for part in new.values()}
    assert num_new > 0
    assert len(new) <= num_new / (SEQUENCES_PER_PART / 2) + SLICES_TO_FALL_INTO_STEP * len(places) < len(parts) / 2
    now = growing.files(*folders)
    assert {name: now[name] for name in files} == files, "nothing that was there was written again"
    assert len(now) - len(files) == 3 * len(new), "a slice, a part and its receipt for each"
    if growing.folds:
        (line,) = said
        assert line.startswith("teacher: adapters of an earlier corpus kept, the text outside their folds has grown by")
        assert line.endswith("% (retrain_growth is 10%)")
        assert_no_adapter_scores_what_it_has_trained_on(growing)
    assert verify_output(str(growing.out), SilentReporter(), deep=True).problems == ()


def test_the_growth_that_is_told_is_that_of_the_text_outside_the_fold_that_grew_most(adapted):
    before = adapted.documents()
    adapted.write("essays/2026-11-01.jsonl", NEW)
    (line,) = adapted.run()
    labels = [
        [
            frame.filter((pl.col("split") == "train") & (pl.col("fold") != fold))["labels"].sum()
            for frame in (before, adapted.documents())
        ]
        for fold in (0, 1)
    ]
    growth = max(now / then - 1 for then, now in labels)
    assert growth > 0
    assert f" has grown by {100 * growth:.1f}% " in line


def test_text_that_grew_by_more_than_the_share_trains_anew_and_each_fold_is_judged_alone(adapted):
    before, trained = adapted.adapters, adapted.documents()
    adapted.write("essays/2026-11-01.jsonl", NEW)
    adapted.run()
    assert adapted.adapters == before
    growths = []
    for fold in (0, 1):
        outside = (pl.col("split") == "train") & (pl.col("fold") != fold)
        then, now = (frame.filter(outside)["labels"].sum() for frame in (trained, adapted.documents()))
        growths.append(now / then - 1)
    assert growths[0] != growths[1]
    between = sum(growths) / 2
    (line,) = adapted.run(teacher={"retrain_growth": between})
    assert line.startswith("teacher: 1 of 2 adapters of an earlier corpus kept")
    kept = [now == then for now, then in zip(adapted.adapters, before, strict=True)]
    assert kept == [growth <= between for growth in growths]
    assert_no_adapter_scores_what_it_has_trained_on(adapted)

    assert adapted.run(teacher={"retrain_growth": 0}) == []
    assert not set(adapted.adapters) & set(before)
    exact = adapted.adapters
    assert adapted.run() == []
    assert adapted.adapters == exact, "that of this very corpus is preferred"


def test_a_document_that_is_gone_or_edited_trains_anew_whoever_knew_it(adapted):
    gone = adapted.documents().filter((pl.col("split") == "train") & (pl.col("fold") == 1)).row(7, named=True)
    before, parts = adapted.adapters, adapted.parts
    number = int(gone["name"].rpartition(" ")[2]) - 1
    assert "essays" in gone["name"]
    numbers = list(range(40))
    numbers[number] = 95
    adapted.write("essays/2026-11-02.jsonl", numbers)
    adapted.run()
    learnt = [in_hex(path) for path in (adapted.out / "teacher").glob("fold-0-*")]
    assert [gone["document_id"] in ids for ids in learnt].count(True) == 1, "the old one knew it, the new one does not"
    assert adapted.adapters[0] != before[0]
    assert adapted.adapters[1] == before[1], "which never knew it, and whose text is as it was"
    stays = [part_id for part_id, part in parts.items() if part.fold == 1]
    assert len(set(stays) - set(adapted.parts)) <= SLICES_TO_FALL_INTO_STEP
    assert_no_adapter_scores_what_it_has_trained_on(adapted)


@pytest.mark.parametrize(
    ("change", "teacher"),
    [
        ({"holdout_fraction": 0.3}, {}),
        ({}, {"folds": 3}),
        ({"context_tokens": 40}, {}),
        ({}, {"lora": {"rank": 2}}),
    ],
)
def test_text_that_is_held_out_or_dealt_otherwise_and_other_settings_train_anew(adapted, change, teacher):
    before = adapted.adapters
    adapted.run(teacher={"retrain_growth": 9, **teacher}, **change)
    assert not set(adapted.adapters) & set(before)
    assert_no_adapter_scores_what_it_has_trained_on(adapted)


def test_slices_of_another_size_and_documents_in_another_order_keep_the_adapters(adapted):
    before = adapted.adapters
    assert adapted.run(sequences_per_part=7) == [], "these are the adapters of this text"
    assert adapted.adapters == before
    adapted.write("essays/2026-11-02.jsonl", reversed(range(40)))
    (line,) = adapted.run(teacher={"retrain_growth": 0})
    assert "has grown by 0.0% (retrain_growth is 0%)" in line
    assert adapted.adapters == before


def test_of_two_that_will_do_the_one_that_knows_more_is_kept(adapted):
    before = adapted.adapters
    adapted.write("essays/2026-11-03.jsonl", range(90, 96))
    adapted.run(teacher={"retrain_growth": 0})
    larger = adapted.adapters
    assert not set(larger) & set(before)
    adapted.write("essays/2026-11-04.jsonl", range(96, 99))
    adapted.run(teacher={"retrain_growth": 1})
    assert adapted.adapters == larger


def test_status_counts_folds_and_not_adapters(adapted, capsys):
    adapted.write("essays/2026-11-03.jsonl", range(90, 96))
    adapted.run(teacher={"retrain_growth": 0})
    assert len(list((adapted.out / "teacher").glob("fold-*"))) == 4
    assert main(["status", str(adapted.out), "--json"]) == 0
    (teacher,) = (stage for stage in json.loads(capsys.readouterr().out)["stages"] if stage["stage"] == "teacher")
    assert teacher["figures"] == {"adapters": 2, "folds": 2}
    for path in (adapted.out / "teacher").glob("fold-1-*/receipt.json"):
        path.unlink()
    assert main(["status", str(adapted.out), "--json"]) == 0
    (teacher,) = (stage for stage in json.loads(capsys.readouterr().out)["stages"] if stage["stage"] == "teacher")
    assert (teacher["complete"], teacher["figures"]["adapters"]) == (False, 1)


def test_targets_of_kept_adapters_are_what_those_say_when_asked_again(adapted):
    adapted.write("essays/2026-11-01.jsonl", NEW)
    adapted.run()
    assert rescore(str(adapted.out), SilentReporter(), num=12).num_beyond == 0


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "receipt.json"])
def test_a_bad_adapter_that_was_kept_is_trained_again_to_the_same_bytes(adapted, file):
    """On the documents that its list names, in their order, though the corpus has others among them."""
    adapted.write("essays/2026-11-01.jsonl", NEW)
    adapted.run()
    (folder,) = (adapted.out / "teacher").glob("fold-0-*")
    contents = {path: path.read_bytes() for path in folder.iterdir()}
    parts = adapted.parts
    flipped = bytearray(contents[folder / file])
    flipped[len(flipped) // 2] ^= 1
    (folder / file).write_bytes(flipped)
    assert verify_output(str(adapted.out), SilentReporter(), deep=False).problems
    repair(str(adapted.out), SilentReporter(), deep=False)
    assert list((adapted.out / "teacher").glob("fold-0-*")) == [folder]
    assert {path: path.read_bytes() for path in folder.iterdir()} == contents
    adapted.run()
    assert adapted.parts == parts


def lose(*paths):
    for path in paths:
        path.unlink()


@pytest.mark.parametrize("lost", ["receipt.json", "*"])
def test_an_adapter_that_the_manifest_names_and_that_is_gone_is_found_and_made_again(adapted_run, tmp_path, lost):
    """Also where no file is left: the corpus is the one that it was trained on."""
    adapted = adapted_run.copy(tmp_path / "job")
    (folder,) = (adapted.out / "teacher").glob("fold-1-*")
    contents = {path: path.read_bytes() for path in folder.iterdir() if path.name != "log.jsonl"}
    lose(*folder.glob(lost))
    (problem,) = verify_output(str(adapted.out), SilentReporter(), deep=False).problems
    assert f"adapter {adapted.adapters[1][:16]}, with which the targets were made, is missing" in problem
    repaired = repair(str(adapted.out), SilentReporter(), deep=False)
    assert repaired.made == (f"teacher/{folder.name}",)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != "log.jsonl"} == contents
    assert verify_output(str(adapted.out), SilentReporter(), deep=False).problems == ()


def test_an_adapter_that_cannot_be_made_as_it_was_is_not_replaced_by_another_in_silence(adapted):
    adapted.write("essays/2026-11-01.jsonl", NEW)
    adapted.run()
    (folder,) = (adapted.out / "teacher").glob("fold-0-*")
    shutil.rmtree(folder)
    parts = adapted.files("targets")
    with pytest.raises(NotRepairable, match=r"`softshard run JOB\.yaml` goes on"):
        repair(str(adapted.out), SilentReporter(), deep=False)
    assert adapted.files("targets") == parts
    digest = adapted.adapters[0]
    adapted.run()
    assert adapted.adapters[0] != digest


def test_targets_are_asked_of_the_adapters_that_made_them_though_a_run_would_choose_others(adapted):
    """A run that retrained and was stopped before its targets leaves both."""
    adapted.write("essays/2026-11-01.jsonl", range(91, 120))
    run_job(load_job(adapted.job()), SilentReporter(), stages=STAGES[:2])
    assert len(list((adapted.out / "teacher").glob("fold-*"))) == 4
    assert rescore(str(adapted.out), SilentReporter(), num=8).num_beyond == 0


def test_a_damaged_adapter_that_nothing_names_any_more_is_set_aside_and_not_trained(adapted):
    (old,) = (adapted.out / "teacher").glob("fold-0-*")
    adapted.write("essays/2026-11-01.jsonl", range(91, 120))
    adapted.run()
    assert len(list((adapted.out / "teacher").glob("fold-0-*"))) == 2
    (old / "adapter_model.safetensors").write_bytes(b"")
    assert verify_output(str(adapted.out), SilentReporter(), deep=False).problems
    repaired = repair(str(adapted.out), SilentReporter(), deep=False)
    assert repaired.made == ()
    assert not (old / "adapter_model.safetensors").exists()
    assert verify_output(str(adapted.out), SilentReporter(), deep=False).problems == ()


def test_a_list_of_documents_that_another_parquet_wrote_is_kept_as_it_is(adapted):
    """The same rows in other bytes, as after an upgrade; the adapter beside them has to be trained again."""
    (folder,) = (adapted.out / "teacher").glob("fold-0-*")
    path = folder / "documents.parquet"
    pq.write_table(pq.read_table(path), path, compression="gzip")
    content = path.read_bytes()
    receipt = json.loads((folder / "receipt.json").read_text())
    receipt["files"]["documents.parquet"] = hashlib.sha256(content).hexdigest()
    (folder / "receipt.json").write_bytes(canonical_json(AdapterReceipt.model_validate(receipt)))
    assert verify_output(str(adapted.out), SilentReporter(), deep=False).problems == ()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    repair(str(adapted.out), SilentReporter(), deep=False)
    assert path.read_bytes() == content
    assert verify_output(str(adapted.out), SilentReporter(), deep=False).problems == ()


def test_an_adapter_without_a_sound_list_is_named_and_never_kept(adapted, capsys):
    adapted.write("essays/2026-11-01.jsonl", NEW)
    (folder,) = (adapted.out / "teacher").glob("fold-0-*")
    before = adapted.adapters
    (folder / "documents.parquet").write_bytes(b"PAR1")
    path = str(adapted.job())
    assert main(["corpus", path, "--quiet"]) == 0
    assert main(["teacher", path, "--quiet"]) == 3
    assert str(folder / "documents.parquet") in capsys.readouterr().err
    (folder / "documents.parquet").unlink()
    adapted.run()
    assert adapted.adapters[0] != before[0]
    assert adapted.adapters[1] == before[1]


def test_a_list_of_documents_holds_each_that_was_trained_on_by_fold_in_order(adapted_run):
    documents = adapted_run.documents()
    for fold in (0, 1):
        (folder,) = (adapted_run.out / "teacher").glob(f"fold-{fold}-*")
        listed = pl.read_parquet(folder / "documents.parquet")
        outside = documents.filter((pl.col("split") == "train") & (pl.col("fold") != fold))
        assert listed["document_id"].bin.encode("hex").to_list() == outside["document_id"].to_list()
        assert listed["fold"].to_list() == [1 - fold] * len(outside)
        assert len(folder.joinpath("documents.parquet").read_bytes()) < 2000 + 20 * len(outside)
        assert math.isclose(json.loads((folder / "receipt.json").read_text())["num_labels"], outside["labels"].sum())
