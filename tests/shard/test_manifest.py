"""The manifest and the card of a set of targets."""

from __future__ import annotations

import pytest

from fakes.parts import committed
from softshard.errors import PartCorrupt
from softshard.shard.card import write_card
from softshard.shard.manifest import read_manifest, write_manifest
from softshard.storage import LocalStore


def test_card_names_the_files_where_others_lie_beside_them(tmp_path):
    store = LocalStore(tmp_path)
    manifest = committed(store, seeds=(0, 1))
    assert "data/train/*.parquet" in (tmp_path / "README.md").read_text()
    (tmp_path / "data/train/part-00000-of-an-earlier-run.parquet").write_bytes(b"old")
    write_card(store, manifest)
    card = (tmp_path / "README.md").read_text()
    assert manifest.parts[0].path in card
    assert "data/train/*.parquet\n" not in card.split("```")[0]


def test_manifest_that_is_not_what_its_pointer_names_is_refused(tmp_path):
    store = LocalStore(tmp_path)
    manifest = committed(store)
    path = tmp_path / f"manifests/{manifest.digest}.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))
    with pytest.raises(PartCorrupt, match="digest"):
        read_manifest(store)


def test_written_manifest_is_read_back_and_written_once(tmp_path):
    store = LocalStore(tmp_path)
    manifest = committed(store)
    assert read_manifest(store) == manifest
    assert write_manifest(store, manifest) is False
