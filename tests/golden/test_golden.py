"""Parts that were written by this or an earlier version say today what they said then."""

import json
from pathlib import Path

import numpy as np
import pytest

from softshard.shard.decode import decode_part
from softshard.shard.schema import PART_SCHEMAS
from softshard.sketch.entries import entries_of

PARTS = sorted((Path(__file__).parent).glob("v*/*.parquet"))


@pytest.mark.parametrize("version", PART_SCHEMAS)
def test_there_are_golden_parts_of_every_kind(version):
    names = {path.stem for path in PARTS if path.parent.name == f"v{version}"}
    assert names == {"threshold", "threshold-draws", "topk", "nucleus", "full"}


@pytest.mark.parametrize("path", PARTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_golden_part_is_read_as_it_was_written(path):
    rows, metadata = decode_part(path.read_bytes(), uri=str(path))
    said = json.loads(path.with_suffix(".json").read_text())
    assert len(said) == metadata.draws
    assert path.parent.name == f"v{metadata.schema_version}"
    for draw, labels in enumerate(said):
        label = iter(labels)
        for sequence, targets in rows:
            entries = entries_of(targets, tau=metadata.tau, draw=draw)
            for j, token in enumerate(sequence.labels.tolist()):
                sequence_id, said_token, ids, weights = next(label)
                here = slice(entries.offsets[j], entries.offsets[j + 1])
                assert (sequence.sequence_id, token) == (sequence_id, said_token)
                assert entries.ids[here].tolist() == ids
                np.testing.assert_allclose(entries.weights[here], weights, rtol=1e-5, atol=2e-7)
        assert next(label, None) is None
