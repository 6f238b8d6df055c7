"""What comes from elsewhere is data: no path in it leaves the output, and nothing in it is ever run."""

import ast
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from pydantic import ValidationError

from softshard.cli import main
from softshard.config.job_file import load_job
from softshard.corpus.manifest import CorpusSlice, DocumentsFile
from softshard.errors import JobInvalid
from softshard.finetune.checkpoint import Checkpoint
from softshard.finetune.record import TrainingReceipt
from softshard.output.workspace import read_owner
from softshard.shard.manifest import Receipt
from softshard.storage import LocalStore
from softshard.teacher.record import AdapterReceipt

SOURCES = sorted((Path(__file__).parents[2] / "pipeline").rglob("*.py"))
LEAVING = ["../x", "/etc/passwd", "data/train/../../x", "data/train/..", "sequences/../x", "a/b", "", ".", "..", "x\ny"]


class Payload:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mknod, (str(self.marker),)


def test_payload_would_run_if_it_were_unpickled(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("path", LEAVING)
@pytest.mark.parametrize(
    ("record", "field"),
    [
        (Receipt, "path"),
        (Receipt, "part_id"),
        (CorpusSlice, "path"),
        (DocumentsFile, "path"),
        (TrainingReceipt, "folder"),
    ],
)
def test_no_record_can_name_a_file_outside_its_folder(record, field, path):
    with pytest.raises(ValidationError) as refused:
        record.model_validate({field: path})
    assert any(error["loc"] == (field,) and "pattern" in error["type"] for error in refused.value.errors())


@pytest.mark.parametrize("record", [AdapterReceipt, TrainingReceipt])
def test_no_receipt_of_an_adapter_can_name_a_file_outside_its_folder(record):
    for path in LEAVING:
        with pytest.raises(ValidationError) as refused:
            record.model_validate({"files": {path: "0" * 64}})
        assert any(error["loc"][0] == "files" and "pattern" in error["type"] for error in refused.value.errors())


def test_checkpoint_that_would_run_code_is_no_checkpoint(tmp_path):
    """Both as a plain pickle and in the layout that torch writes."""
    for name, write in (("plain", lambda value, file: file.write_bytes(pickle.dumps(value))), ("torch", torch.save)):
        write({"version": 1, "identity": "a", "state": Payload(tmp_path / "ran")}, tmp_path / name)
        assert Checkpoint(store=LocalStore(tmp_path), path=name).read(identity="a") is None
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mknod", "!!python/name:os.system", "!mine"])
def test_tags_of_yaml_make_nothing(tmp_path, tag):
    (tmp_path / "job.yaml").write_text(f"name: {tag} ['{tmp_path}/ran']\n")
    with pytest.raises(JobInvalid, match="could not determine a constructor"):
        load_job(tmp_path / "job.yaml")
    assert read_owner(tmp_path) is None
    assert not (tmp_path / "ran").exists()


def test_extension_type_of_parquet_is_not_unpickled(tiny_job, tmp_path):
    """pyarrow before 14.0.1 ran what the metadata of such a column held."""
    pickled = pickle.dumps(Payload(tmp_path / "ran"))
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": pickled}
    texts = pa.array([f"The harbour lay grey at dawn. {number} boats went out." for number in range(30)])
    table = pa.table([texts], schema=pa.schema([pa.field("text", pa.string(), metadata=metadata)]))
    pq.write_table(table, tmp_path / "a.parquet")
    source = {"uri": str(tmp_path / "a.parquet"), "name": "s", "style": "s", "license": "MIT", "rights_basis": "owned"}
    assert (
        main(["corpus", str(tiny_job(tmp_path, corpus={"sources": [source]}, train={"retention": None})), "--quiet"])
        == 0
    )
    assert not (tmp_path / "ran").exists()


def test_job_cannot_ask_for_code_of_a_model(tiny_job, tmp_path):
    for section in ("teacher", "train"):
        path = tiny_job(tmp_path, **{section: {"trust_remote_code": True}})
        assert yaml.safe_load(path.read_text())[section]["trust_remote_code"] is True
        with pytest.raises(JobInvalid, match=rf"{section}\.trust_remote_code: unknown key"):
            load_job(path)


def calls():
    """Every call in the package: where it stands, its dotted name, and its keywords that are constants."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                constants = {
                    word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)
                }
                yield f"{path.name}:{node.lineno}", ast.unparse(node.func), constants


FORBIDDEN = {
    "eval",
    "exec",
    "os.system",
    "pickle.load",
    "pickle.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
    "marshal.loads",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
}


def test_package_calls_nothing_that_runs_what_it_reads():
    found = list(calls())
    assert any(name == "yaml.safe_load" for _, name, _ in found)
    assert [(where, name) for where, name, _ in found if name in FORBIDDEN] == []
    assert [(where, name) for where, name, words in found if words.get("allow_pickle") or words.get("shell")] == []
    loads = [(where, words) for where, name, words in found if name == "torch.load"]
    assert loads
    assert all(words.get("weights_only") is True for _, words in loads)
    models = [
        (where, name, words) for where, name, words in found if name.startswith("Auto") and "from_pretrained" in name
    ]
    assert len(models) >= 3
    assert all(words.get("trust_remote_code") is False for _, _, words in models)
    assert all(words.get("use_safetensors") is True for _, name, words in models if "Model" in name)
    assert not any(words.get("trust_remote_code") for _, _, words in found)
