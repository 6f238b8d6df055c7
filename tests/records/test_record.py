"""Records with spools: their digest is computed once, and belongs to their content."""

from fakes.targets import manifest_of, receipt
from softshard.records.digest import canonical_digest
from softshard.records.spool import Spool
from softshard.shard.manifest import Receipt


def manifest(num_parts=3):
    return manifest_of(
        [
            receipt(f"{number:032x}", f"data/train/part-{number:05d}.parquet", b"part", num_sequences=number)
            for number in range(num_parts)
        ]
    )


def test_the_digest_is_computed_once(monkeypatch):
    record = manifest()
    digest = record.digest
    monkeypatch.setattr(Spool, "lines", None)
    assert record.digest == digest


def test_the_digest_is_that_of_the_whole_record():
    assert manifest().digest == canonical_digest(manifest())
    assert list(manifest().model_dump(mode="json")) == list(type(manifest()).model_fields)


def test_a_changed_copy_has_a_digest_of_its_own():
    record = manifest(3)
    assert record.digest != manifest(2).digest
    assert record.model_copy(update={"parts": Spool(Receipt, record.parts[:2])}).digest == manifest(2).digest
    assert record.model_copy() == record
