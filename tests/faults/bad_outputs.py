"""Faults of an output: parts, receipts, manifests, corpus and adapters that are not what they were."""

import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq

from faults.bad_inputs import Section, flip
from softshard.records.canonical import canonical_json
from softshard.records.digest import sha256_hex
from softshard.shard.commit import receipt_path
from softshard.shard.manifest import read_manifest, write_manifest
from softshard.storage import LocalStore

parts, records = Section("Parts"), Section("Receipts and manifests")
others = Section("Corpus, adapters and the output itself")
SECTIONS = (parts, records, others)


def vouched(place, change):
    """Change the first part, and have its receipt and the manifest vouch for the new bytes: no hash can see it."""
    store, manifest, file = LocalStore(place.targets), read_manifest(place.targets), place.part()
    change(file)
    content = file.read_bytes()
    receipt = manifest.parts[0].model_copy(update={"sha256": sha256_hex(content), "num_bytes": len(content)})
    store.replace(receipt_path(receipt.part_id), canonical_json(receipt))
    rewritten(place, parts=[receipt, *manifest.parts[1:]])


def rewritten(place, **changes):
    """A manifest with changes, under its own digest, and the pointer to it."""
    manifest = read_manifest(place.targets)
    write_manifest(LocalStore(place.targets), type(manifest).model_validate({**manifest.model_dump(), **changes}))


def with_row(change):
    """Rewrites a part whose first row, or metadata, is changed."""

    def rewrite(file):
        table = pq.read_table(file)
        metadata, rows = json.loads(table.schema.metadata[b"softshard"]), table.to_pylist()
        change(rows[0], metadata)
        schema = table.schema.with_metadata({"softshard": json.dumps(metadata)})
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)

    return rewrite


@parts("verify OUT", 3)
def _(place):
    """a truncated part
    its last 50 bytes are removed
    OUT/targets/data/train/part-00000-….parquet: has … bytes, its receipt names …
    """
    place.part().write_bytes(place.part().read_bytes()[:-50])


@parts("verify OUT", 3)
def _(place):
    """a part with a flipped bit
    one bit of its middle byte
    OUT/targets/data/train/part-00000-….parquet: has … bytes with sha256 …, its receipt names …
    """
    flip(place.part())


@parts("show OUT --sequence ''", 3)
def _(place):
    """a part with a flipped bit, opened by a reader
    one bit of the sixth byte from its end, in the footer's length
    OUT/targets/data/train/part-00000-….parquet: has … bytes with sha256 …, its receipt names …
    """
    flip(place.part(), -6)


@parts("verify OUT", 3)
def _(place):
    """two parts swapped
    each has the other's bytes
    OUT/targets/data/train/part-00001-….parquet: has … bytes, its receipt names …
    """
    first, second = place.part(0), place.part(1)
    contents = first.read_bytes(), second.read_bytes()
    assert len(contents[0]) != len(contents[1])
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])


@parts("verify OUT", 3)
def _(place):
    """a missing part
    its file is deleted
    OUT/targets/data/train/part-00000-….parquet: is missing
    """
    place.part().unlink()


@parts("verify OUT", 3)
def _(place):
    """an empty part
    its file is made 0 bytes long
    OUT/targets/data/train/part-00000-….parquet: has 0 bytes, its receipt names …
    """
    place.part().write_bytes(b"")


@parts("verify OUT", 3)
def _(place):
    """a part of 1 TiB
    extended to that size as a sparse file
    OUT/targets/data/train/part-00000-….parquet: has 1,099,511,627,776 bytes, its receipt names …
    """
    os.truncate(place.part(), 2**40)


@parts("verify OUT", 3)
def _(place):
    """a folder where a part should be
    the part is replaced by an empty folder of its name
    OUT/targets/data/train/part-00000-….parquet: …
    """
    file = place.part()
    file.unlink()
    file.mkdir()


@parts("targets IN/job.yaml", 3)
def _(place):
    """a truncated part, found by a run
    its last byte is removed
    OUT/targets/data/train/part-00000-….parquet: has … bytes, its receipt names …
    """
    place.part().write_bytes(place.part().read_bytes()[:-1])


@parts("verify OUT", 3)
def _(place):
    """a foreign Parquet file as a part
    written by pyarrow; receipt and manifest updated to match
    OUT/targets/data/train/part-00000-….parquet: is Parquet, but has no softshard metadata; …
    """
    vouched(place, lambda file: pq.write_table(pa.table({"text": ["a"]}), file))


@parts("verify OUT", 3)
def _(place):
    """text as a part
    receipt and manifest updated to match
    OUT/targets/data/train/part-00000-….parquet: is not readable as Parquet: …
    """
    vouched(place, lambda file: file.write_bytes(b"PAR1 is how it starts, and PAR1"))


@parts("verify OUT", 3)
def _(place):
    """a part of a later version
    schema_version 3 in its metadata; receipt and manifest updated to match
    OUT/targets/data/train/part-00000-….parquet: has schema version 3, this softshard reads 1 and 2; …
    """
    vouched(place, with_row(lambda row, metadata: metadata.update(schema_version=3)))


@parts("verify OUT", 3)
def _(place):
    """a part that says another version than it has
    schema_version 2 in the metadata of a part of version 1; receipt and manifest updated to match
    OUT/targets/data/train/part-00000-….parquet: its columns are not those of schema version 2; …
    """
    vouched(place, with_row(lambda row, metadata: metadata.update(schema_version=2)))


@parts("verify OUT", 3)
def _(place):
    """a part with another tokenizer
    another fingerprint in its metadata; receipt and manifest updated to match
    OUT/targets/data/train/part-00000-….parquet: its tokenizer fingerprint is not the manifest's
    """
    vouched(place, with_row(lambda row, metadata: metadata.update(tokenizer_fingerprint="0" * 64)))


@parts("verify OUT", 3)
def _(place):
    """a part under another part's name
    another id in its metadata; receipt and manifest updated to match
    OUT/targets/data/train/part-00000-….parquet: says it is part 11111111111111111111111111111111, its receipt says …
    """
    vouched(place, with_row(lambda row, metadata: metadata.update(part_id="1" * 32)))


@parts("verify OUT --deep", 3)
def _(place):
    """a mass that is not a number
    NaN as the tail mass of one label; receipt and manifest updated to match
    OUT/targets/data/train/part-00000-….parquet: sequence …: the mass of a label is not 1
    """
    vouched(place, with_row(lambda row, metadata: row["tail_mass"].__setitem__(0, float("nan"))))


@parts("verify OUT --deep", 3)
def _(place):
    """a token outside the vocabulary
    999,999 as a token of the text; receipt and manifest updated to match
    OUT/targets/data/train/part-00000-….parquet: sequence …: a token of the text is outside the vocabulary …
    """
    vouched(place, with_row(lambda row, metadata: row["token_ids"].__setitem__(0, 999_999)))


@parts("verify OUT --deep", 3)
def _(place):
    """lists of inconsistent lengths
    one label's entropy is dropped; receipt and manifest updated to match
    OUT/targets/data/train/part-00000-….parquet: sequence …: entropy does not match its tokens; …
    """
    vouched(place, with_row(lambda row, metadata: row["entropy"].pop()))


@records("verify OUT", 3)
def _(place):
    """a part without its receipt
    the receipt is deleted
    OUT/targets/receipts/….json: the receipt is missing
    """
    place.receipt().unlink()


@records("verify OUT", 3)
def _(place):
    """a truncated receipt
    its last 20 bytes are removed
    OUT/targets/receipts/….json: the receipt is not the one that the manifest names
    """
    place.receipt().write_bytes(place.receipt().read_bytes()[:-20])


@records("verify OUT", 3)
def _(place):
    """the receipt of another part
    its file is copied under this part's name
    OUT/targets/receipts/….json: the receipt is not the one that the manifest names
    """
    shutil.copy(place.receipt(1), place.receipt(0))


@records("verify OUT", 3)
def _(place):
    """receipts without parts
    data/ and the manifest are deleted
    OUT/targets/data/test/part-….parquet: is missing
    """
    (place.targets / "manifest.json").unlink()
    shutil.rmtree(place.targets / "data")


@records("status OUT", 3)
def _(place):
    """a receipt with a path outside the folder
    path ../../../etc/passwd in it, and the manifest deleted
    OUT/targets/receipts/….json: is not a receipt: String should match pattern …; …
    """
    file = place.receipt()
    file.write_text(file.read_text().replace("data/train/", "../../../etc/passwd/"))
    (place.targets / "manifest.json").unlink()


@records("verify OUT", 3)
def _(place):
    """a manifest with a path outside the folder
    path ../../../etc/passwd in it
    OUT/targets/manifests/….json: is not a manifest: …
    """
    file = place.manifest()
    file.write_text(file.read_text().replace("data/train/", "../../../etc/passwd/"))


@records("status OUT", 3)
def _(place):
    """a pointer to a file outside the folder
    manifest.json names ../../job.yaml
    OUT/targets/manifest.json: does not point at a manifest: it names '../../job.yaml'; …
    """
    pointer = {"manifest": "../../job.yaml", "digest": "0" * 64}
    (place.targets / "manifest.json").write_text(json.dumps(pointer))


@records("verify OUT", 3)
def _(place):
    """a pointer to a missing manifest
    the manifest it names is deleted
    OUT/targets/manifests/….json: is missing, and manifest.json points at it; …
    """
    place.manifest().unlink()


@records("show OUT --sequence 0", 3)
def _(place):
    """a pointer of 100,000 brackets
    manifest.json is [[[[…
    OUT/targets/manifest.json: does not point at a manifest: maximum recursion depth exceeded…; …
    """
    (place.targets / "manifest.json").write_text("[" * 100_000)


@records("verify OUT", 3)
def _(place):
    """a manifest with a flipped bit
    the last digit of its seed
    OUT/targets/manifests/….json: has the digest …, and not that of its name; …
    """
    place.manifest().write_text(place.manifest().read_text().replace('"seed": 0', '"seed": 1'))


@records("verify OUT", 3)
def _(place):
    """a manifest with the same content in other bytes
    a space at its end
    OUT/targets/manifests/….json: has the right content, but not the bytes that were written
    """
    place.manifest().write_text(place.manifest().read_text() + " ")


@records("verify OUT", 3)
def _(place):
    """a manifest of a later version
    schema_version 3, under its own digest
    OUT/targets/manifests/….json: has schema version 3, this softshard reads 1 and 2; …
    """
    rewritten(place, schema_version=3)


@records("verify OUT", 3)
def _(place):
    """a manifest of another run
    it names a part that never existed here
    OUT/targets/data/train/part-00000-of-another-run.parquet: is missing
    """
    part = read_manifest(place.targets).parts[0]
    other = {"part_id": "1" * 32, "path": "data/train/part-00000-of-another-run.parquet"}
    rewritten(place, job="another", parts=[part.model_copy(update=other)])


@records("verify OUT", 3)
def _(place):
    """a manifest in another order than its corpus
    two of its parts change places, under its own digest
    OUT/targets/manifests/….json: part 0 is of slice …, the corpus has slice … there
    """
    first, second, *rest = read_manifest(place.targets).parts
    rewritten(place, parts=[second, first, *rest])


@records("verify OUT", 3)
def _(place):
    """no manifest
    manifest.json is deleted
    OUT/targets/manifest.json: missing or made with other settings, so the targets stage is not complete; …
    """
    (place.targets / "manifest.json").unlink()


@records("gc OUT --yes", 3)
def _(place):
    """gc with a manifest that cannot be read
    manifest.json is {}
    OUT/targets/manifest.json: does not point at a manifest: 'digest'; …
    """
    (place.targets / "manifest.json").write_text("{}")


@others("verify OUT", 3)
def _(place):
    """a slice of the corpus with a flipped bit
    one bit of its middle byte
    OUT/corpus/sequences/train-0-….parquet: has … bytes with sha256 …, the corpus manifest names …; …
    """
    flip(place.slice())


@others("verify OUT", 3)
def _(place):
    """a missing slice
    its file is deleted
    OUT/corpus/sequences/train-0-….parquet: is missing; …
    """
    place.slice().unlink()


@others("corpus IN/job.yaml", 3)
def _(place):
    """a truncated corpus manifest
    half of it is removed
    OUT/corpus/manifest.json: is not the manifest of a corpus: …; …
    """
    file = place.out / "corpus/manifest.json"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@others("verify OUT", 3)
def _(place):
    """a corpus manifest with a path outside the folder
    path ../../x in its manifest
    OUT/corpus/manifest.json: is not the manifest of a corpus: …; …
    """
    file = place.out / "corpus/manifest.json"
    file.write_text(file.read_text().replace("sequences/", "../../x", 1))


@others("targets IN/job.yaml", 3)
def _(place):
    """a teacher's adapter with a flipped bit
    one bit of its middle byte
    OUT/teacher/fold-0-…/adapter_model.safetensors: is not the file that the adapter's receipt names; …
    """
    flip(next((place.out / "teacher").glob("fold-0-*/adapter_model.safetensors")))


@others("verify OUT", 3)
def _(place):
    """an adapter's receipt with a path outside the folder
    file ../../../etc/passwd in it
    OUT/teacher/fold-0-…/receipt.json: cannot be read: String should match pattern …
    """
    file = next((place.out / "teacher").glob("fold-0-*/receipt.json"))
    file.write_text(file.read_text().replace("adapter_config.json", "../../../etc/passwd"))


@others("verify OUT", 3)
def _(place):
    """a truncated trained adapter
    its last byte is removed
    OUT/adapter/baseline-…/adapter_model.safetensors: has sha256 …, its receipt names …
    """
    file = next((place.out / "adapter").glob("baseline-*/adapter_model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


@others("status OUT", 2)
def _(place):
    """an output whose job.yaml is garbage
    zeros are written over it
    OUT: holds no output of softshard (no job.yaml with a name)
    """
    (place.out / "job.yaml").write_bytes(bytes(1000))


@others("verify OUT", 2)
def _(place):
    """no output at all
    the folder is deleted
    OUT: holds no output of softshard (no job.yaml with a name)
    """
    shutil.rmtree(place.out)


@others("run IN/job.yaml", 2)
def _(place):
    """the output of another job
    the job has another name
    OUT: this folder belongs to job 'tiny', and this job's name is 'another'; set `out` to another folder
    """
    place.change_job(name="another")


@others("run IN/job.yaml", 2)
def _(place):
    """a folder with other things
    it holds a thesis, and no job.yaml
    OUT: this folder holds other files and no job.yaml; set `out` to another folder
    """
    (place.out / "job.yaml").unlink()
    (place.out / "thesis.txt").write_text("mine")


@others("verify OUT", 0)
def _(place):
    """temporary files of killed writers
    partial files in .tmp and targets/.tmp
    no problems found
    """
    for folder in (place.out / ".tmp", place.targets / ".tmp"):
        folder.mkdir(exist_ok=True)
        (folder / "part.parquet.0a1b").write_bytes(b"PAR1")
