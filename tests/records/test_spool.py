"""Records in a temporary file, and long JSON by its items: the same as if all of it were in memory."""

import hashlib
import io
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from fakes.targets import manifest_of, receipt
from softshard.errors import StorageFull
from softshard.records import spool as spool_module
from softshard.records.canonical import canonical_json, write_canonical_json
from softshard.records.digest import members_digest
from softshard.records.json_stream import read_json_items
from softshard.records.spool import Spool, temporary_disk
from softshard.shard.manifest import Manifest, read_manifest, write_manifest
from softshard.storage import LocalStore


class Note(BaseModel):
    text: str
    number: float


NOTES = [
    Note(text=text, number=number) for number, text in enumerate(["", "line\nbreak", "ü€😀", "x" * 300_000, "end"])
]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12)
records = st.dictionaries(st.text(), values, max_size=5)


def test_a_spool_gives_its_records_in_order_as_often_as_asked():
    spool = Spool(Note, NOTES)
    assert list(spool) == NOTES
    assert list(spool) == NOTES
    assert len(spool) == 5
    assert [spool[place] for place in range(-5, 5)] == NOTES + NOTES
    assert spool[1:4:2] == NOTES[1:4:2]
    with pytest.raises(IndexError):
        spool[5]


def test_two_readers_and_a_writer_do_not_disturb_each_other():
    spool = Spool(Note, NOTES[:3])
    first, second = iter(spool), iter(spool)
    assert [next(first), next(second), next(first)] == [NOTES[0], NOTES[0], NOTES[1]]
    spool.append(NOTES[4])
    assert next(second) == NOTES[1]
    assert list(spool) == [*NOTES[:3], NOTES[4]]


def test_a_spool_is_equal_by_what_it_holds_and_goes_to_another_process():
    spool = Spool(Note, NOTES)
    assert pickle.loads(pickle.dumps(spool)) == spool
    assert Spool(Note, NOTES[1:]) != spool
    assert Spool(Note, [NOTES[1], NOTES[0], *NOTES[2:]]) != spool


def test_a_number_that_is_not_finite_comes_back():
    (note,) = Spool(Note, [Note(text="", number=float("-inf"))])
    assert note.number == float("-inf")


def test_a_full_disk_is_that_of_the_temporary_files(monkeypatch):
    monkeypatch.setattr(spool_module.tempfile, "gettempdir", lambda: "/somewhere")
    with (
        pytest.raises(StorageFull, match="/somewhere: no space left"),
        temporary_disk(),
        open("/dev/full", "wb") as full,
    ):
        full.write(b"x")


def by_item(content, name):
    items = []
    return read_json_items(io.BytesIO(content), name=name, on_item=items.append), items


def same(one, other):
    """Equal, where not-a-number is equal to itself."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@settings(max_examples=200, deadline=None)
@given(record=records, name=st.text(), items=st.lists(values, max_size=4))
def test_a_record_by_its_items_is_the_json_of_the_whole(record, name, items):
    record = {key: value for key, value in record.items() if key != name}
    whole = {**record, name: items}
    file = io.BytesIO()
    write_canonical_json(file, {**record, name: iter(items)})
    expected = json.dumps(whole, sort_keys=True, indent=1, ensure_ascii=False) + "\n"
    assert file.getvalue().decode("utf-8", "surrogatepass") == expected
    compact = json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert members_digest({**record, name: iter(items)}) == hashlib.sha256(compact.encode()).hexdigest()


@settings(max_examples=200, deadline=None)
@given(
    record=records, items=st.lists(values, max_size=4), indent=st.none() | st.integers(0, 3), block=st.integers(1, 40)
)
def test_json_of_any_layout_is_read_by_its_items(record, items, indent, block):
    from softshard.records import json_stream

    before, json_stream._BLOCK_BYTES = json_stream._BLOCK_BYTES, block
    try:
        content = json.dumps({**record, "items": items}, indent=indent).encode()
        rest, found = by_item(content, "items")
    finally:
        json_stream._BLOCK_BYTES = before
    assert same(found, items)
    assert same(rest, {key: value for key, value in record.items() if key != "items"})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"items": 3}',
        b'{"items": [1, 2}',
        b'{"items": [1 2]}',
        b'{"items": [1, 2]',
        b'{"items": [1]} x',
        b'{"items": [tru]}',
        b'{"a" 1}',
        b'{"a": "\xff"}',
    ],
)
def test_what_is_not_a_record_with_that_list_is_refused(content):
    with pytest.raises(ValueError, match=r"."):
        by_item(content, "items")


def manifest(num_parts=40):
    return manifest_of(
        [
            receipt(f"{number:032x}", f"data/train/part-{number:05d}.parquet", b"part", num_sequences=number)
            for number in range(num_parts)
        ]
    )


@pytest.mark.parametrize("num_parts", [0, 1, 40])
def test_a_manifest_is_written_and_named_as_if_it_were_in_memory(tmp_path, num_parts):
    store, written = LocalStore(tmp_path), manifest(num_parts)
    write_manifest(store, written)
    plain = written.model_dump(mode="json")
    assert len(plain["parts"]) == num_parts
    compact = json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digest = hashlib.sha256(compact.encode()).hexdigest()
    content = (tmp_path / f"manifests/{digest}.json").read_bytes()
    assert content == (json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
    assert content == canonical_json(written)
    assert read_manifest(store) == written
    assert read_manifest(store).digest == digest


def test_a_manifest_takes_receipts_from_any_sequence_and_refuses_what_is_none():
    plain = manifest(3).model_dump(mode="json")
    assert Manifest.model_validate(plain) == manifest(3)
    with pytest.raises(ValidationError, match="parts"):
        Manifest.model_validate({**plain, "parts": [{"part_id": "x"}]})
