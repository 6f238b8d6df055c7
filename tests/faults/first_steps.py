"""Mistakes of somebody's first day, each made in the job of README's "Your own corpus"."""

# ruff: noqa: E501 - a message is one line

from __future__ import annotations

import json

from fakes.tiny import TEXTS, save_tiny_model
from faults.bad_inputs import Place, Section

files, values = Section("The job file"), Section("Its values")
texts, models, commands = Section("Texts"), Section("Models and machines"), Section("Commands")
SECTIONS = (files, values, texts, models, commands)

JOB = """\
name: letters
out: IN/out
corpus:
  sources:
    - name: letters
      uri: IN/letters
      style: literary
      license: CC0-1.0
      rights_basis: public-domain
teacher:
  model: IN/model
"""


def job(place: Place, *changes: tuple[str, str], more: str = "") -> None:
    """Write the job with some of its words replaced, and lines at its end; beside it thirty texts and a model."""
    text = JOB + more
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    (place.folder / "job.yaml").write_text(text.replace("IN/", f"{place.folder}/"))
    folder = place.folder / "letters"
    folder.mkdir(exist_ok=True)
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"{TEXTS[number % len(TEXTS)]} {number}.")
    if not (place.folder / "model").exists():
        (place.folder / "model").symlink_to(place.model)


def only(place: Place, name: str, content: str | bytes) -> None:
    """Replace the texts by one file."""
    folder = place.folder / "letters"
    for file in folder.iterdir():
        file.unlink()
    (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


@files("run IN/jbo.yaml", 2)
def _(place):
    """a misspelt job file
    its name is job.yaml
    IN/jbo.yaml: cannot be read: No such file or directory
    """
    job(place)


@files("run IN/job.yaml", 2)
def _(place):
    """a tab in place of spaces
    before `model`
    IN/job.yaml: line 11: is not YAML: found character … that cannot start any token
    """
    job(place, ("  model:", "\tmodel:"))


@files("run IN/job.yaml", 2)
def _(place):
    """a misspelt section
    `traim` for `train`
    IN/job.yaml: line 12, traim: unknown key; did you mean `train`?
    """
    job(place, more="traim:\n  alpha: 0.5\n")


@files("run IN/job.yaml", 2)
def _(place):
    """the short name of a key
    `lr` for `learning_rate`
    IN/job.yaml: line 14, train.optimizer.lr: unknown key; did you mean `learning_rate`?
    """
    job(place, more="train:\n  optimizer:\n    lr: 1.0e-4\n")


@files("run IN/job.yaml", 2)
def _(place):
    """a key in the wrong section
    `holdout_fraction` in `train`
    IN/job.yaml: line 13, train.holdout_fraction: unknown key; did you mean `corpus.holdout_fraction`?
    """
    job(place, more="train:\n  holdout_fraction: 0.2\n")


@files("run IN/job.yaml", 2)
def _(place):
    """a source without a licence
    the line is left out
    IN/job.yaml: line 5, corpus.sources[0]: `license` is missing
    """
    job(place, ("      license: CC0-1.0\n", ""))


@files("run IN/job.yaml", 2)
def _(place):
    """one source, not as a list
    the dash before `name` is left out
    IN/job.yaml: line 4, corpus.sources: input should be a list, not {'license': 'CC0-1.0', 'name': 'letters', 'rights_basis': 'public-domain', 'style': 'literary', ...}
    """
    job(place, ("    - name", "      name"))


@files("run IN/job.yaml", 2)
def _(place):
    """a key given twice
    `uri` for two folders
    IN/job.yaml: line 7, corpus.sources[0].uri: the key is given twice (first on line 6)
    """
    job(place, ("      style", "      uri: IN/more\n      style"))


@values("run IN/job.yaml", 2)
def _(place):
    """a right in other words
    rights_basis: public domain
    IN/job.yaml: line 9, corpus.sources[0].rights_basis: input should be 'public-domain', 'owned', 'licensed' or 'consented', not 'public domain'
    """
    job(place, ("public-domain", "public domain"))


@values("run IN/job.yaml", 2)
def _(place):
    """a licence that is no SPDX identifier
    license: Creative Commons
    IN/job.yaml: line 8, corpus.sources[0].license: 'Creative Commons' is not an SPDX licence expression, such as CC0-1.0, MIT or LicenseRef-Owned
    """
    job(place, ("CC0-1.0", "Creative Commons"))


@values("run IN/job.yaml", 2)
def _(place):
    """a share in percent
    alpha: 75
    IN/job.yaml: line 13, train.alpha: input should be less than or equal to 1, not 75
    """
    job(place, more="train:\n  alpha: 75\n")


@values("run IN/job.yaml", 2)
def _(place):
    """a tau that is not a share
    tau: 24
    IN/job.yaml: line 13, target.tau: must be from 1/32768 to 1, not 24; `kind: full` stores every token
    """
    job(place, more="target:\n  tau: 24\n")


@values("run IN/job.yaml", 2)
def _(place):
    """a misspelt kind of target
    kind: treshold
    IN/job.yaml: line 13, target.kind: unknown kind 'treshold'; the kinds are 'threshold', 'topk', 'nucleus', 'full'
    """
    job(place, more="target:\n  kind: treshold\n")


@values("run IN/job.yaml", 2)
def _(place):
    """one fold
    folds: 1
    IN/job.yaml: line 10, teacher: folds must be 0 or at least 2: with one fold no document is outside it
    """
    job(place, ("  model:", "  folds: 1\n  model:"))


@values("run IN/job.yaml", 2)
def _(place):
    """no hold-out
    holdout_fraction: 0
    job letters: corpus.holdout_fraction: is 0, but the report and the choice among trainings are measured on the hold-out; set it above 0, or run the stages corpus, teacher and targets alone
    """
    job(place, ("corpus:\n", "corpus:\n  holdout_fraction: 0\n"))


@values("run IN/job.yaml", 2)
def _(place):
    """a number in words
    epochs: two
    IN/job.yaml: line 14, train.optimizer.epochs: input should be a number, not 'two'
    """
    job(place, more="train:\n  optimizer:\n    epochs: two\n")


@texts("run IN/job.yaml", 2)
def _(place):
    """a misspelt folder of texts
    uri: IN/leters
    IN/job.yaml: line 6, corpus.sources[0].uri: IN/leters: no such file or folder
    """
    job(place, ("IN/letters", "IN/leters"))


@texts("run IN/job.yaml", 3)
def _(place):
    """a folder with pictures alone
    one .png
    IN/letters: source 'letters': has no ending that `format: auto` knows (.txt, .text, .md, .markdown, .jsonl, .ndjson, .parquet, each also with .zst, .gz, .bz2 or .xz after it); rename it, or set `format`; 1 file not read: 1 .png (first: file://IN/letters/a.png)
    """
    job(place)
    only(place, "a.png", b"\x89PNG\r\n")


@texts("run IN/job.yaml", 2)
def _(place):
    """a table
    uri: IN/letters/all.csv
    IN/job.yaml: line 6, corpus.sources[0].uri: IN/letters/all.csv: `format: auto` does not read it: convert .csv, in Python: polars.read_csv('a.csv').write_parquet('a.parquet')
    """
    job(place, ("IN/letters", "IN/letters/all.csv"))
    only(place, "all.csv", "id,text\n1,hello\n")


@texts("run IN/job.yaml", 2)
def _(place):
    """a JSON array
    uri: IN/letters/all.json
    IN/job.yaml: line 6, corpus.sources[0].uri: IN/letters/all.json: `format: auto` does not read it: if each line of a .json file is one object, set `format: jsonl`; else convert it, in Python: polars.read_json('a.json').write_ndjson('a.jsonl')
    """
    job(place, ("IN/letters", "IN/letters/all.json"))
    only(place, "all.json", json.dumps([{"text": text} for text in TEXTS]))


@texts("run IN/job.yaml", 3)
def _(place):
    """texts under another name
    JSON Lines with the field `body`, and no `text_field`
    IN/letters: source 'letters': none of its 12 documents has text in the field 'text'; check `text_field`
    """
    job(place)
    only(place, "all.jsonl", "".join(json.dumps({"body": text}) + "\n" for text in TEXTS))


@texts("run IN/job.yaml", 3)
def _(place):
    """one document
    a book in one file
    the test split of the corpus has no documents (1 kept, 0 empty, 0 undecodable, 0 oversize, 0 malformed, 0 duplicate); documents are held out whole, by a hash of each, and these are too few for both splits: add documents to `corpus.sources`, set `split_texts` of the source if a text holds several, or change `corpus.holdout_fraction`
    """
    job(place)
    only(place, "book.txt", "\n\n".join(TEXTS * 5))


@texts("run IN/job.yaml", 3)
def _(place):
    """documents in an old encoding
    files in Windows-1252
    IN/letters: source 'letters': 25 of its 30 documents (83.3%) cannot be used: 25 undecodable (first: file://IN/letters/0.txt); set the source's `encoding`, for example to windows-1252, or set `corpus.max_left_out` above 0.05
    """
    job(place)
    for number in range(25):
        (place.folder / f"letters/{number}.txt").write_bytes(f"caf\xe9 {number}".encode("cp1252"))


@models("run IN/job.yaml", 2)
def _(place):
    """a misspelt model folder
    model: IN/modle
    IN/job.yaml: line 11, teacher.model: IN/modle: no such folder (did you mean IN/model?)
    """
    job(place, ("IN/model", "IN/modle"))


@models("run IN/job.yaml", 3)
def _(place):
    """a student with another tokenizer
    train.model: IN/student, with a smaller vocabulary
    IN/student: gives logits for 290 tokens, but IN/model has a vocabulary of 300; teacher and student must share one tokenizer
    """
    job(place, more="train:\n  model: IN/student\n")
    save_tiny_model(place.folder / "student", vocab_size=290)


@models("run IN/job.yaml", 3)
def _(place):
    """a context longer than the model's
    context_tokens: 100000
    IN/model: has 512 positions, `corpus.context_tokens` is 100000; lower it, or use another model
    """
    job(place, ("corpus:\n", "corpus:\n  context_tokens: 100000\n"))


@models("run IN/job.yaml", 2)
def _(place):
    """a GPU that is not there
    device: cuda:7
    teacher.device: cuda:7: torch sees … here; set `device: auto` or `device: cpu`
    """
    job(place, ("  model:", "  device: cuda:7\n  model:"))


@models("run IN/job.yaml", 2)
def _(place):
    """an engine that is not installed
    engine: vllm
    teacher.engine: vllm is not installed; install softshard[vllm], or set `engine: transformers`
    """
    job(place, ("  model:", "  engine: vllm\n  model:"))


@commands("train IN/job.yaml", 2)
def _(place):
    """training before there are targets
    the first command is `train`
    IN/out/corpus/manifest.json: missing or made with other settings, so the corpus stage is not complete; run `softshard corpus JOB.yaml`
    """
    job(place)


@commands("status IN/letters", 2)
def _(place):
    """the status of another folder
    the folder of the texts
    IN/letters: holds no output of softshard (no job.yaml with a name)
    """
    job(place)


@commands("status IN/job.yaml", 2)
def _(place):
    """the status of a job that has not run
    no output yet
    IN/out: holds no output of softshard (no job.yaml with a name)
    """
    job(place)


@commands("run IN/job.yaml", 2)
def _(place):
    """an output folder with other things in it
    out: IN/letters
    IN/letters: this folder holds other files and no job.yaml; set `out` to another folder
    """
    job(place, ("IN/out", "IN/letters"))


@commands("run IN/job.yaml", 2)
def _(place):
    """the output of another job
    out: OUT
    OUT: this folder belongs to job 'tiny', and this job's name is 'letters'; set `out` to another folder
    """
    job(place, ("IN/out", str(place.out)))


@commands("show OUT --sequence f00", 3)
def _(place):
    """an id that no sequence has
    a wrong beginning
    OUT: no sequence has an id that starts with 'f00'; `softshard status OUT` lists some
    """


@commands("export IN/job.yaml --to IN/exported", 2)
def _(place):
    """an export before there is an adapter
    the job has not run
    IN/out/job.yaml: cannot be read: there is no output of softshard here
    """
    job(place)
