"""Faults of what comes from elsewhere: job files, documents, models, disks and clocks."""

import errno
import gzip
import json
import os
import shutil
import subprocess
import tempfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
import zstandard

from fakes.tiny import save_tiny_model
from faults.bad_inputs import Section
from softshard.cli import main
from softshard.shard.manifest import read_manifest

jobs, documents = Section("Job files"), Section("Documents")
models, machines = Section("Models"), Section("Disks and clocks")
SECTIONS = (jobs, documents, models, machines)
TEXT = "The harbour lay grey at dawn, and two boats went out. One of them came back before noon with nothing in it. "


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def good(count=20):
    """Documents that nothing is wrong with."""
    return lines(*({"text": f"{TEXT * 3}{number}."} for number in range(count)))


CHAT = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"


def talks(count=20):
    """Conversations that nothing is wrong with."""
    words = ({"role": role, "content": f"{TEXT[:30]}{role}"} for role in ("user", "assistant"))
    question, answer = words
    return lines(*({"messages": [question, {**answer, "content": f"{TEXT}{n}."}]} for n in range(count)))


@jobs("corpus IN/job.yaml", 2)
def _(place):
    """YAML that would run a command
    a tag !!python/object/apply:os.system
    IN/job.yaml: line 1: is not YAML: could not determine a constructor for the tag …
    """
    (place.folder / "job.yaml").write_text('!!python/object/apply:os.system ["touch /tmp/softshard-was-here"]\n')


@jobs("plan IN/job.yaml", 2)
def _(place):
    """aliases of aliases of aliases
    60 lines of YAML that expand to 9^60 values
    IN/job.yaml: …; line 61, name: input should be a valid string, not [[[[...], …
    """
    bomb = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 60))
    (place.folder / "job.yaml").write_text(f"a0: &a0 [x]\n{bomb}name: *a59\n")


@jobs("run IN/job.yaml", 2)
def _(place):
    """a job nested 20,000 deep
    name: [[[[…
    IN/job.yaml: is not a job: it is nested too deeply
    """
    (place.folder / "job.yaml").write_text("name: " + "[" * 20_000)


@jobs("run IN/job.yaml", 2)
def _(place):
    """an empty job
    0 bytes
    IN/job.yaml: line 1: must be a mapping with the keys name, out, corpus, teacher
    """
    (place.folder / "job.yaml").write_bytes(b"")


@jobs("run IN/job.yaml", 2)
def _(place):
    """a job file that is not text
    bytes that are not UTF-8
    IN/job.yaml: is not UTF-8 at byte 0
    """
    (place.folder / "job.yaml").write_bytes(b"\xff\xfe\x00")


@jobs("run IN/job.yaml", 2)
def _(place):
    """a name with a path outside the folder
    name: ../../elsewhere
    IN/job.yaml: line 1, name: string should match pattern …, not '../../elsewhere'
    """
    place.change_job(name="../../elsewhere")


@jobs("run IN/job.yaml", 2)
def _(place):
    """a name with a newline
    name: a, newline, b
    IN/job.yaml: line 1, name: string should match pattern …, not 'a\\nb'
    """
    place.change_job(name="a\nb")


@jobs("run IN/job.yaml", 2)
def _(place):
    """an output folder whose name is too long
    300 characters
    IN/aaa…: cannot be written: File name too long; set `out` to a folder that can be written to
    """
    place.change_job(out=str(place.folder / ("a" * 300)))


@jobs("corpus IN/job.yaml", 0)
def _(place):
    """an output folder whose name has a newline, a space and a Greek letter
    the output is written there
    corpus    complete
    """
    place.read_file("a.jsonl", good())
    place.change_job(out=str(place.folder / "two\nlines of λ"))


@documents("corpus IN/job.yaml", 3)
def _(place):
    """nothing but empty documents
    an empty one and one of spaces
    the corpus has no documents (0 kept, 2 empty, 0 undecodable, 0 oversize, 0 malformed, 0 duplicate); …
    """
    place.read_file("a.jsonl", lines({"text": ""}, {"text": " \n\t"}))


@documents("corpus IN/job.yaml", 0)
def _(place):
    """a giant document
    4 MB in one line where 1 MB is allowed: counted, left out, never held in memory
    corpus: 20 of 21 documents kept; left out 1 oversize (first: …/a.jsonl, line 1)
    """
    place.read_file("a.jsonl", lines({"text": "x" * 2**22}) + good())
    place.change_job(corpus={"max_document_bytes": 2**20})


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a retention text of one document
    it cannot be in both splits
    the … split of the text of train.retention has no documents (1 kept, …); … `train.retention.sources`, …
    """
    place.read_file("a.jsonl", good())
    (place.folder / "other.jsonl").write_bytes(good(1))
    described = {"name": "r", "style": "plain", "license": "MIT", "rights_basis": "owned"}
    sources = [described | {"uri": str(place.folder / "other.jsonl")}]
    place.change_job(corpus={"holdout_fraction": 0.2}, train={"retention": {"sources": sources}})


@documents("corpus IN/job.yaml", 0)
def _(place):
    """a document of one token
    a single letter among others
    corpus: 21 of 21 documents kept
    """
    place.read_file("a.jsonl", lines({"text": "x"}) + good())


@documents("corpus IN/job.yaml", 0)
def _(place):
    """a file whose name has a newline, and that is not UTF-8
    counted and named on one line
    corpus: 20 of 21 documents kept; left out 1 undecodable (first: …/two lines.txt)
    """
    (place.folder / "texts").mkdir()
    (place.folder / "texts/two\nlines.txt").write_bytes(b"\xff\xfe")
    (place.folder / "texts/good.jsonl").write_bytes(good())
    place.read_from(place.folder / "texts")


@documents("corpus IN/job.yaml", 0)
def _(place):
    """lines that are not JSON, not an object, or have no text
    four of them, one nested 100,000 deep; max_left_out: 0.2
    corpus: 20 of 24 documents kept; left out 4 malformed (first: …/a.jsonl, line 1)
    """
    bad = b'{"text": \n[1]\n{"title": "x"}\n' + b'{"text": ' + b"[" * 100_000 + b"\n"
    place.read_file("a.jsonl", bad + good())
    place.change_job(corpus={"max_left_out": 0.2})


@documents("corpus IN/job.yaml", 0)
def _(place):
    """half a surrogate pair
    \\ud800 in JSON
    corpus: 20 of 21 documents kept; left out 1 undecodable (first: …/a.jsonl, line 1)
    """
    place.read_file("a.jsonl", b'{"text": "\\ud800"}\n' + good())


@documents("corpus IN/job.yaml", 0)
def _(place):
    """a conversation with an unknown role
    counted, left out, named by its line
    corpus: 20 of 21 documents kept; left out 1 malformed (first: …/a.jsonl, line 21)
    """
    tool = {"messages": [{"role": "user", "content": "So?"}, {"role": "tool", "content": "5"}]}
    place.read_file("a.jsonl", talks() + lines(tool), layout="messages")
    place.change_job(corpus={"chat_template": CHAT, "context_tokens": 256})


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a chat template that renders no answer as the model would see it
    it begins with the number of turns; conversations are counted, and all are left out
    …: source 's': none of its 20 documents can be used: …line 1: … renders turn 2 with another beginning than …
    """
    place.read_file("a.jsonl", talks(), layout="messages")
    place.change_job(corpus={"chat_template": f"{{{{ messages | length }}}}{CHAT}"})


@documents("corpus IN/job.yaml", 3)
def _(place):
    """conversations of another layout
    layout: sharegpt for rows of messages
    …: source 's': none of its 20 documents can be used: …/a.jsonl, line 1: has no field 'conversations'
    """
    place.read_file("a.jsonl", talks(), layout="sharegpt")
    place.change_job(corpus={"chat_template": CHAT})


@documents("corpus IN/job.yaml", 2)
def _(place):
    """conversations for a model without a chat template
    no `corpus.chat_template` either; nothing is read
    corpus.chat_template: the tokenizer of the model has none; give `chat_template` the text of a Jinja template, or …
    """
    place.read_file("a.jsonl", talks(), layout="messages")


@documents("corpus IN/job.yaml", 2)
def _(place):
    """a chat template that is not Jinja
    a loop that does not end; nothing is read
    corpus.chat_template: line 1: Unexpected end of template. …; give `chat_template` the text of a Jinja template, …
    """
    place.read_file("a.jsonl", talks(), layout="messages")
    place.change_job(corpus={"chat_template": CHAT.removesuffix("{% endfor %}")})


@documents("corpus IN/job.yaml", 0)
def _(place):
    """text that spells the end of a document
    <|end|> is treated as text
    corpus: 21 of 21 documents kept
    """
    place.read_file("a.jsonl", lines({"text": f"Before. <|end|> {TEXT * 3}"}) + good())


@documents("corpus IN/job.yaml", 0)
def _(place):
    """NUL and other line endings
    a copy that differs only in these is still a duplicate
    corpus: 20 of 21 documents kept; left out 1 duplicate (first: …/a.jsonl, line 21)
    """
    copy = f"{TEXT * 3}0.".replace("dawn", "\x00dawn")
    place.read_file("a.jsonl", good() + lines({"text": copy}))


@documents("corpus IN/job.yaml", 0)
def _(place):
    """the same text from two sources
    as JSON Lines, and again as files that end with a newline
    corpus: 20 of 40 documents kept; left out 20 duplicate (first: …/files/00.txt)
    """
    (place.folder / "files").mkdir()
    for number, line in enumerate(good().splitlines()):
        (place.folder / f"files/{number:02}.txt").write_text(f"{json.loads(line)['text']}\n")
    place.read_file("a.jsonl", good())
    source = yaml.safe_load((place.folder / "job.yaml").read_text())["corpus"]["sources"][0]
    place.change_job(corpus={"sources": [source, {**source, "name": "t", "uri": str(place.folder / "files")}]})


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a truncated gzip file
    its last 20 bytes are removed
    file://IN/a.jsonl.gz: source 's': cannot be read: Compressed file ended before the end-of-stream marker was reached
    """
    place.read_file("a.jsonl.gz", gzip.compress(good())[:-20])


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a truncated zstandard file
    its last 20 bytes are removed
    file://IN/a.jsonl.zst: source 's': cannot be read: …
    """
    place.read_file("a.jsonl.zst", zstandard.ZstdCompressor().compress(good())[:-20])


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a truncated Parquet source
    its last 10 bytes are removed
    file://IN/a.parquet: source 's': cannot be read: …
    """
    pq.write_table(pa.table({"text": [TEXT]}), place.folder / "whole.parquet")
    place.read_file("a.parquet", (place.folder / "whole.parquet").read_bytes()[:-10])


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a Parquet column that holds no text
    pickled objects in a struct, which are never unpickled
    file://IN/a.parquet: source 's': column 'text' holds struct<pickle: binary>, not text; …
    """
    rows = [{"pickle": b"cos\nsystem\n(S'touch /tmp/softshard-was-here'\ntR."}]
    pq.write_table(pa.table({"text": rows}), place.folder / "a.parquet")
    place.read_from(place.folder / "a.parquet")


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a folder with nothing readable in it
    one picture
    IN/pictures: source 's': has no ending that `format: auto` knows …
    """
    (place.folder / "pictures").mkdir()
    (place.folder / "pictures/a.png").write_bytes(b"\x89PNG")
    place.read_from(place.folder / "pictures")


@documents("corpus IN/job.yaml", 2)
def _(place):
    """a missing source
    no file of that name
    IN/job.yaml: line …, corpus.sources[0].uri: IN/nothing.jsonl: no such file or folder
    """
    place.read_from(place.folder / "nothing.jsonl")


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a field that no document has
    text_field: body
    IN/a.jsonl: source 's': none of its 20 documents has text in the field 'body'; check `text_field`
    """
    place.read_file("a.jsonl", good(), text_field="body")


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a field that was renamed
    270 of 300 lines have `body` in place of `text`
    IN/a.jsonl: source 's': 270 of its 300 documents (90.0%) cannot be used: 270 malformed (…: has no field 'text'); …
    """
    place.read_file("a.jsonl", lines(*({"body": f"{TEXT}{n}."} for n in range(270))) + good(30))


@documents("corpus IN/job.yaml", 3)
def _(place):
    """files in Windows-1252
    36 of 40
    IN/texts: source 's': 36 of its 40 documents (90.0%) cannot be used: 36 undecodable (…); set … `encoding`, …
    """
    (place.folder / "texts").mkdir()
    for n in range(40):
        text = f"{TEXT} {'café' if n < 36 else 'inn'} {n}."
        (place.folder / f"texts/{n:02}.txt").write_text(text, encoding="windows-1252")
    place.read_from(place.folder / "texts")


@documents("corpus IN/job.yaml", 0)
def _(place):
    """files of a folder that are not read
    a clone of a data set from a hub, with its card, and with CSV beside it
    source 's': 2 files not read: 1 .csv, 1 README or LICENSE (first: file://IN/texts/b.csv)
    """
    (place.folder / "texts").mkdir()
    (place.folder / "texts/README.md").write_text("# The card\n")
    (place.folder / "texts/b.csv").write_text("text\n")
    (place.folder / "texts/a.jsonl").write_bytes(good())
    place.read_from(place.folder / "texts")


@documents("corpus IN/job.yaml", 2)
def _(place):
    """a source in CSV
    the file is named as the source
    IN/job.yaml: line …, corpus.sources[0].uri: IN/a.csv: `format: auto` does not read it: convert .csv, in Python: …
    """
    place.read_file("a.csv", b"text\nx\n")


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a JSON array for JSON Lines
    indented, in a file a.jsonl
    file://IN/a.jsonl: source 's': is a JSON array, and JSON Lines has one object per line; convert it, …
    """
    place.read_file("a.jsonl", json.dumps([{"text": TEXT}] * 3, indent=2).encode())


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a list of chat messages as text
    text_field: messages
    IN/a.jsonl: source 's': none of its 3 documents can be used: …field 'messages' holds a list of objects, not text; …
    """
    place.read_file("a.jsonl", lines(*({"messages": [{"content": TEXT}]} for _ in range(3))), text_field="messages")


@documents("corpus IN/job.yaml", 3)
def _(place):
    """a group that is a list
    group_field: authors
    IN/a.jsonl: source 's': none of its 3 documents can be used: …field 'authors', the `group_field`, holds a list …
    """
    place.read_file("a.jsonl", lines(*({"text": TEXT, "authors": ["Ada"]} for _ in range(3))), group_field="authors")


def model_of(place, **config):
    """A copy of the model, with changes to its config, which the job then names."""
    shutil.rmtree(place.out)
    shutil.copytree(place.model, place.folder / "model")
    file = place.folder / "model/config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    place.change_job(teacher={"model": str(place.folder / "model"), "folds": 0})
    return place.folder / "model"


@models("corpus IN/job.yaml", 3)
def _(place):
    """a model that comes with code
    auto_map in config.json names a module that would create a file
    IN/model: its config.json cannot be read: …
    """
    folder = model_of(place, model_type="mine", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("open('/tmp/softshard-was-here', 'w')\n")


@models("run IN/job.yaml", 3)
def _(place):
    """a model whose weights are a pickle
    pytorch_model.bin in place of model.safetensors
    IN/model: the folder has no weights (*.safetensors)
    """
    folder = model_of(place)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


@models("corpus IN/job.yaml", 3)
def _(place):
    """a model without a tokenizer
    tokenizer.json is deleted
    IN/model: the tokenizer cannot be loaded: …
    """
    folder = model_of(place)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@models("corpus IN/job.yaml", 3)
def _(place):
    """a folder that is not a model
    config.json is deleted
    IN/model: the folder has no config.json, so it is not a transformers model
    """
    (model_of(place) / "config.json").unlink()


@models("corpus IN/job.yaml", 2)
def _(place):
    """a misspelt folder
    the job names IN/modle, beside which there is IN/model
    IN/job.yaml: line …, teacher.model: IN/modle: no such folder (did you mean IN/model?)
    """
    model_of(place)
    place.change_job(teacher={"model": str(place.folder / "modle")})


@models("run IN/job.yaml", 3)
def _(place):
    """truncated weights
    the last 1,000 bytes of model.safetensors are removed
    IN/model: model.safetensors is cut off or no safetensors file (…); fetch the model again
    """
    folder = model_of(place)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


@models("run IN/job.yaml", 3)
def _(place):
    """a student with fewer logits than the teacher has tokens
    another model, with logits for 290 tokens; nothing is computed
    IN/student: gives logits for 290 tokens, but IN/model has a vocabulary of 300; …
    """
    model_of(place)
    save_tiny_model(place.folder / "student", vocab_size=290)
    place.change_job(train={"model": str(place.folder / "student")})
    place.then.append(lambda: no_output(place))


@models("plan IN/job.yaml", 2)
def _(place):
    """a quantised model without its package
    config.json says that the weights are quantised; plan and run compute nothing
    teacher.model: IN/model: is quantised (awq) and needs a package that is not installed: …
    """
    model_of(place, quantization_config={"quant_method": "awq", "bits": 4})
    place.then.append(lambda: no_output(place))


@models("run IN/job.yaml", 2)
def _(place):
    """a CUDA device that is not there
    train.device: cuda:7; nothing is computed
    train.device: cuda:7: torch sees … here; set `device: auto` or `device: cpu`…
    """
    model_of(place)
    place.change_job(train={"device": "cuda:7"})
    place.then.append(lambda: no_output(place))


def no_output(place):
    assert not place.out.exists() or not list(place.out.iterdir())


def mounted(place, target, *options):
    """Mount a file system for the time of a test, or skip it where that is not allowed."""
    if subprocess.run(["mount", *options, target], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    place.undo.callback(subprocess.run, ["umount", target], check=True)


def goes_on(place, stage, mount):
    """The disk gets room, and the same command ends well."""
    subprocess.run(["mount", "-o", "remount,size=64m", str(mount)], check=True)
    assert main([stage, str(place.folder / "job.yaml"), "--quiet"]) == 0


@machines("corpus IN/job.yaml", 75)
def _(place):
    """a full disk
    the output is a tmpfs of 64 KiB; with more room the same command succeeds
    OUT/corpus/…: no space left on the device; free some space and run the job again, committed parts are kept
    """
    place.read_file("a.jsonl", good(300))
    place.out.mkdir()
    mounted(place, str(place.out), "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    place.then.append(lambda: goes_on(place, "corpus", place.out))


@machines("targets IN/job.yaml", 75)
def _(place):
    """a disk that fills while parts are committed
    targets/ is a tmpfs of 64 KiB; with more room the same command gives the same parts
    OUT/targets/data/…: no space left on the device; free some space and run the job again, committed parts are kept
    """
    shutil.rmtree(place.targets)
    place.targets.mkdir()
    mounted(place, str(place.targets), "-t", "tmpfs", "-o", "size=64k", "tmpfs")
    place.change_job(cluster={"scheduler": place.scheduler})
    before = read_manifest(place.finished / "targets")

    def same_parts():
        goes_on(place, "targets", place.targets)
        assert read_manifest(place.targets) == before

    place.then.append(same_parts)


@machines("targets IN/job.yaml", 75)
def _(place):
    """a full disk for temporary files
    the folder for them is a tmpfs of three inodes; with more the same command succeeds
    IN/tmp/…: no space left on the device; free some space and run the job again, committed parts are kept
    """
    shutil.rmtree(place.targets)
    folder = place.folder / "tmp"
    folder.mkdir()
    mounted(place, str(folder), "-t", "tmpfs", "-o", "nr_inodes=3", "tmpfs")
    place.undo.callback(setattr, tempfile, "tempdir", tempfile.tempdir)
    tempfile.tempdir = str(folder)

    def goes_on_with_more():
        subprocess.run(["mount", "-o", "remount,nr_inodes=10000", str(folder)], check=True)
        assert main(["targets", str(place.folder / "job.yaml"), "--quiet"]) == 0

    place.then.append(goes_on_with_more)


@machines("corpus IN/job.yaml", 2)
def _(place):
    """a read-only disk
    the output is mounted read-only
    OUT/…: cannot be written: Read-only file system; set `out` to a folder that can be written to
    """
    mounted(place, str(place.out), "--bind", str(place.out))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(place.out)], check=True)


@machines("verify OUT", 0)
def _(place):
    """a read-only disk that is only read
    the output is mounted read-only
    no problems found
    """
    mounted(place, str(place.out), "--bind", str(place.out))
    subprocess.run(["mount", "-o", "remount,bind,ro", str(place.out)], check=True)


@machines("corpus IN/job.yaml", 2)
def _(place):
    """a file system without hard links
    `link` fails with ENOSYS, as on gcsfuse
    OUT: cannot be written: its file system makes no hard links (Function not implemented), …
    """

    def no_links(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    shutil.rmtree(place.out)
    place.undo.callback(setattr, os, "link", os.link)
    os.link = no_links


@machines("corpus IN/job.yaml", 2)
def _(place):
    """a file where the output folder should be
    it holds one line
    OUT: …
    """
    shutil.rmtree(place.out)
    place.out.write_text("not a folder")


@machines("verify OUT", 0)
def _(place):
    """a wrong clock while files were written
    half of the output is dated 1970, half 2100
    no problems found
    """
    for number, file in enumerate(sorted(place.out.rglob("*"))):
        os.utime(file, (4102444800 * (number % 2),) * 2)


@machines("targets IN/job.yaml", 0)
def _(place):
    """documents with new modification times
    set to 2100: they are read again, and no part is computed (there is no cluster)
    targets   complete
    """
    source = yaml.safe_load((place.folder / "job.yaml").read_text())["corpus"]["sources"][0]
    shutil.copy(source["uri"], place.folder / "tales.jsonl")
    os.utime(place.folder / "tales.jsonl", (4102444800,) * 2)
    place.change_job(corpus={"sources": [{**source, "uri": str(place.folder / "tales.jsonl")}]})
    assert main(["corpus", str(place.folder / "job.yaml"), "--quiet"]) == 0
    place.change_job(cluster={"scheduler": "tcp://127.0.0.1:9"})
