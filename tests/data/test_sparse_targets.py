from __future__ import annotations

import torch

from softshard.data.sparse_targets import SparseTargets


def targets(**change):
    """Three labels with two entries, none and one."""
    given = {
        "entry_ids": torch.tensor([7, 8, 9]),
        "entry_weights": torch.tensor([0.5, 0.25, 1.0]),
        "entry_offsets": torch.tensor([0, 2, 2, 3]),
        "entry_in_head": torch.tensor([False, True, True]),
        "tail_mass": torch.tensor([0.25, 1.0, 0.0]),
        "position_weights": torch.tensor([1.0, 0.5, 2.0]),
    }
    return SparseTargets(**{**given, **change})


def plain(item):
    return {name: tensor.tolist() for name, tensor in item.tensors().items()}


def test_named_tensors_hold_all_of_it_and_leave_out_what_is_none():
    made = targets(counted=torch.ones(3))
    assert plain(SparseTargets.from_tensors({**made.tensors(), "positions": torch.arange(3)})) == plain(made)
    without = targets(entry_in_head=None, tail_mass=None)
    assert sorted(without.tensors()) == ["entry_ids", "entry_offsets", "entry_weights", "position_weights"]
    assert SparseTargets.from_tensors({**without.tensors(), "tail_mass": None}).tail_mass is None


def test_selected_labels_keep_their_own_entries():
    assert plain(targets(counted=torch.tensor([1.0, 2.0, 3.0])).select(torch.tensor([1, 2]))) == {
        "entry_ids": [9],
        "entry_weights": [1.0],
        "entry_offsets": [0, 0, 1],
        "entry_in_head": [True],
        "tail_mass": [1.0, 0.0],
        "position_weights": [0.5, 2.0],
        "counted": [2.0, 3.0],
    }
    assert plain(targets().select(torch.tensor([], dtype=torch.int64)))["entry_offsets"] == [0]


def test_the_mean_is_by_the_weights_without_those_of_groups_and_never_divides_by_zero():
    assert float(targets().mean_divisor) == 3.5
    assert float(targets(counted=torch.tensor([1.0, 1.0, 0.0])).mean_divisor) == 2
    empty = targets(counted=torch.ones(3)).without_weight()
    assert empty.position_weights.tolist() == [0, 0, 0]
    assert float(empty.mean_divisor) == 1


def test_it_moves_whole():
    moved = targets().to("meta")
    assert {tensor.device.type for tensor in moved.tensors().values()} == {"meta"}
