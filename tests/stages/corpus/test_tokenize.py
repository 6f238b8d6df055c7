"""A corpus whose texts were tokenised by workers is the corpus that one process makes."""

import pytest

from fakes.outputs import tree
from softshard.cluster import cluster as cluster_module
from softshard.cluster.cluster import Cluster
from softshard.config import ClusterSettings, CorpusSettings, SourceSettings
from softshard.config.job_file import load_job
from softshard.corpus import reading
from softshard.errors import PartsFailed, SourceUnreadable
from softshard.stages.corpus import stage as corpus_stage
from softshard.stages.corpus import tokenize as encoding
from softshard.stages.corpus.tokenize import is_worth_a_cluster
from softshard.stages.job import run_job
from softshard.telemetry import SilentReporter


@pytest.fixture
def any_corpus(monkeypatch):
    """Any corpus is worth a cluster, and is given to it in batches of a few documents."""
    monkeypatch.setattr(encoding, "_LEAST_BYTES", 0)
    monkeypatch.setattr(reading, "_BATCH_DOCUMENTS", 2)


def test_workers_give_the_corpus_of_one_process(any_corpus, finished, tiny_job, tmp_path, monkeypatch):
    batches = []
    in_order = Cluster.map_in_order

    def counted(cluster, function, tasks, **names):
        for result in in_order(cluster, function, tasks, **names):
            batches.append(len(result))
            yield result

    monkeypatch.setattr(Cluster, "map_in_order", counted)
    run_job(load_job(tiny_job(tmp_path, cluster={"workers": 2})), SilentReporter(), stages=("corpus",))
    of = ("corpus", "retention")
    assert tree(tmp_path / "out", of=of) == tree(finished, of=of)
    assert sum(batches) == 30 + 15, "the documents of both"


def test_a_worker_with_another_tokenizer_refuses(any_corpus, tiny_model, tiny_job, tmp_path, monkeypatch):
    monkeypatch.setattr(
        corpus_stage,
        "encode_on",
        lambda cluster, *, model, fingerprint, out: encoding.encode_on(
            cluster, model=model, fingerprint="another", out=out
        ),
    )
    with pytest.raises(PartsFailed, match="TokenizerMismatch"):
        run_job(load_job(tiny_job(tmp_path)), SilentReporter(), stages=("corpus",))
    assert not (tmp_path / "out/corpus/manifest.json").exists()


def test_a_source_that_breaks_off_is_named_and_leaves_no_corpus(any_corpus, tiny_job, tmp_path):
    documents = tmp_path / "some.jsonl"
    documents.write_text("".join(f'{{"text": "number {index}"}}\n' for index in range(30)))
    (tmp_path / "torn.jsonl.gz").write_bytes(b"\x1f\x8b\x08\x00")
    sources = [
        {"name": name, "uri": str(tmp_path / file), "style": "s", "license": "MIT", "rights_basis": "owned"}
        for name, file in (("some", "some.jsonl"), ("torn", "torn.jsonl.gz"))
    ]
    path = tiny_job(tmp_path, corpus={"sources": sources})
    with pytest.raises(SourceUnreadable, match="torn"):
        run_job(load_job(path), SilentReporter(), stages=("corpus",))
    assert not (tmp_path / "out/corpus/manifest.json").exists()


@pytest.mark.parametrize(
    ("cluster", "num_bytes", "worth"),
    [
        ({"workers": 2}, 64 * 2**20, True),
        ({"workers": 2}, 64 * 2**20 - 1, False),
        ({"workers": 1}, 2**30, False),
        ({"adaptive": {"maximum": 4}}, 2**30, True),
        ({"scheduler": "tcp://somewhere:8786"}, 2**30, True),
    ],
)
def test_little_text_or_one_worker_is_not_worth_a_cluster(tmp_path, cluster, num_bytes, worth):
    with (tmp_path / "text.txt").open("wb") as file:
        file.truncate(num_bytes)
    source = SourceSettings(name="s", uri=str(tmp_path), style="s", license="MIT", rights_basis="owned")
    settings = CorpusSettings(sources=(source,))
    assert is_worth_a_cluster(settings, ClusterSettings(**cluster)) is worth


def test_a_small_corpus_starts_no_cluster(tiny_job, tmp_path, monkeypatch):
    monkeypatch.delattr(cluster_module, "open_cluster")
    path = tiny_job(tmp_path, cluster={"workers": 2})
    run_job(load_job(path), SilentReporter(), stages=("corpus",))
    assert (tmp_path / "out/corpus/manifest.json").exists()
