"""Filters on a sequence's columns, and weights of labels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from fakes.targets import numbered_parts, numbers_in, write_targets
from softshard.data.dataset import SoftLabelDataset
from softshard.data.filters import RowFilter
from softshard.data.mixing import LabelWeights
from softshard.data.row_index import index_rows
from softshard.data.target_set import TargetSet
from softshard.errors import FilterMatchesNothing, PartCorrupt, ResumeMismatch
from softshard.records.spool import Spool
from softshard.shard.decode import decode_part
from softshard.shard.manifest import Receipt
from softshard.storage import LocalStore

SETTINGS = {"seed": 1, "batch_tokens": 64, "shuffle_buffer": 20, "alpha": 0.5}
ALONE = {"rank": 0, "world_size": 1, "prefetch": 0}


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """300 rows, three row groups; styles alternate, sources change at row 130."""
    (rows,) = numbered_parts(np.random.default_rng(4), (300,))
    named = [
        (replace(tokens, style=("plain", "ornate")[n % 2], source="first" if n < 130 else "second"), sketch)
        for n, (tokens, sketch) in enumerate(rows)
    ]
    store, manifest = write_targets(tmp_path_factory.mktemp("targets"), [named])
    return TargetSet(store=store, manifest=manifest)


def dataset(targets, where=None, **changes):
    return SoftLabelDataset(replace(targets, where=where or RowFilter()), **{**SETTINGS, **ALONE, **changes})


def seen(data):
    return sorted(number for batch in data for number in numbers_in(batch))


def table(targets):
    """What pyarrow reads of the part, by another route than the data set's."""
    return pq.read_table(targets.store.local_path(targets.manifest.parts[0].path)).to_pylist()


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        (RowFilter(style=("ornate",)), lambda row: row["style"] == "ornate"),
        (RowFilter(source=("second", "third")), lambda row: row["source"] == "second"),
        (RowFilter(fold=(0,)), lambda row: row["fold"] == 0),
        (RowFilter(mean_entropy=(2.4, 2.6)), lambda row: 2.4 <= row["mean_entropy"] <= 2.6),
        (
            RowFilter(style=("plain",), mean_label_logprob=(-4.5, 0.0)),
            lambda row: row["style"] == "plain" and row["mean_label_logprob"] >= -4.5,
        ),
    ],
)
def test_a_filter_lets_exactly_the_sequences_through_that_meet_it(targets, where, holds):
    expected = [number for number, row in enumerate(table(targets)) if holds(row)]
    assert 0 < len(expected) <= 300
    assert seen(dataset(targets, where)) == expected


class CountingStore(LocalStore):
    """A store that says how many bytes were read from its streams."""

    def __init__(self, root):
        super().__init__(root)
        self.num_bytes = 0

    def open(self, path):
        store, stream = self, super().open(path)

        class Counted:
            def read(self, size=-1):
                content = stream.read(size)
                store.num_bytes += len(content)
                return content

            def __getattr__(self, name):
                return getattr(stream, name)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                stream.close()

        return Counted()


def test_row_groups_whose_statistics_rule_all_rows_out_are_not_read(targets):
    read = {}
    for source in ("first", "second", "absent"):
        store = CountingStore(targets.store.uri)
        index = index_rows(store, targets.manifest.parts, where=RowFilter(source=(source,)))
        read[source] = store.num_bytes
        assert [bool(index.lengths[start:stop].any()) for start, stop in index.groups[0]] == {
            "first": [True, True, False],
            "second": [False, True, True],
            "absent": [False, False, False],
        }[source]
    assert read["absent"] < read["first"]


def test_nothing_that_passes_is_an_error_that_says_what_was_asked(targets):
    with pytest.raises(FilterMatchesNothing, match=r"style \('gothic',\)"):
        dataset(targets, RowFilter(style=("gothic",))).batches_per_epoch(0)


def test_a_state_under_another_filter_is_refused(targets):
    state = dataset(targets, RowFilter(style=("plain",))).state_dict()
    with pytest.raises(ResumeMismatch, match="where"):
        dataset(targets).load_state_dict(state)
    dataset(targets, RowFilter(style=("plain",))).load_state_dict(state)


def test_the_order_is_the_same_each_time_under_a_filter(targets):
    where = RowFilter(style=("plain",))
    one, other = ([numbers_in(batch) for batch in dataset(targets, where)] for _ in range(2))
    assert one == other


def test_a_part_of_another_size_is_found_before_its_rows_are_read(tmp_path):
    store, manifest = write_targets(tmp_path, numbered_parts(np.random.default_rng(0), (4,)))
    longer = manifest.parts[0].model_copy(update={"num_bytes": manifest.parts[0].num_bytes + 1})
    data = dataset(TargetSet(store=store, manifest=manifest.model_copy(update={"parts": Spool(Receipt, [longer])})))
    with pytest.raises(PartCorrupt, match=f"its receipt names {longer.num_bytes:,}"):
        data.batches_per_epoch(0)


def test_weights_of_labels_follow_their_points(targets):
    """Flat below the first point and above the last one, a straight line between; worked out label by label."""
    weights = LabelWeights(entropy=((2.0, 0.5), (3.0, 1.5)), label_logprob=((-6.0, 0.0), (-4.0, 1.0)))
    content = targets.store.read(targets.manifest.parts[0].path)
    rows, _ = decode_part(content, uri="part")
    for batch in dataset(targets, weights=weights):
        given = iter(batch.position_weights.tolist())
        for number in numbers_in(batch):
            stored = rows[number][1]
            for entropy, logprob in zip(stored.entropy.tolist(), stored.label_logprob.tolist(), strict=True):
                by_entropy = 0.5 + min(max(entropy - 2.0, 0.0), 1.0)
                by_logprob = min(max((logprob + 6.0) / 2.0, 0.0), 1.0)
                assert next(given) == pytest.approx(by_entropy * by_logprob, abs=1e-6)
        assert next(given, None) is None


def test_weights_change_what_batches_hold_but_not_their_order(targets):
    weights = LabelWeights(entropy=((2.0, 0.5), (3.0, 1.5)))
    plain, weighed = dataset(targets), dataset(targets, weights=weights)
    assert plain.digest != weighed.digest
    assert plain.state_dict() == weighed.state_dict()


@pytest.mark.parametrize("points", [((2.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (1.0, 2.0)), ((1.0, -0.1),)])
def test_points_that_do_not_rise_or_weigh_less_than_nothing_are_refused(points):
    with pytest.raises(ValueError, match="values must rise"):
        LabelWeights(entropy=points)
