"""`softshard blend`: what several outputs make together, from the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fakes.targets import numbered_parts, write_targets
from softshard.cli import main
from softshard.shard.manifest import write_manifest


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """Two outputs of the same twelve sequences, and one of eight of them."""
    folder = tmp_path_factory.mktemp("outs")
    (rows,) = numbered_parts(np.random.default_rng(0), (12,))
    for name, parts in (("first", [rows]), ("second", [rows[6:], rows[:6]]), ("short", [rows[:8]])):
        store, manifest = write_targets(folder / name / "targets", parts)
        write_manifest(store, manifest)
    lengths = [len(tokens.token_ids) for tokens, _ in rows]
    entropies = np.concatenate([targets.entropy for _, targets in rows])
    return folder, lengths, float(entropies.mean())


def answer(capsys, *arguments):
    code = main(["blend", "--json", *map(str, arguments)])
    return code, json.loads(capsys.readouterr().out)


def test_two_teachers_of_the_same_sequences_can_be_blended(outs, capsys):
    folder, lengths, entropy = outs
    code, values = answer(capsys, folder / "first", folder / "second", "--weights", 1, 3)
    assert code == 0
    assert (values["can_blend"], values["num_common"]) == (True, 12)
    assert [one["share"] for one in values["sets"]] == [0.25, 0.75]
    assert values["num_tokens"] == 2 * sum(lengths)
    assert [one["times_seen"] for one in values["sets"]] == [0.5, 1.5]
    assert values["tokens_by_style"] == {"plain": 2 * sum(lengths)}
    assert values["blend_entropy_nats"] == pytest.approx(entropy, abs=0.04)


def test_what_a_set_lacks_is_counted(outs, capsys):
    folder, *_ = outs
    _, values = answer(capsys, folder / "first", folder / "short")
    assert values["can_blend"] is False
    assert [one["num_missing"] for one in values["sets"]] == [0, 4]
    assert values["blend_entropy_nats"] is None
    assert main(["blend", str(folder / "first"), str(folder / "short")]) == 0
    assert "short/targets lacks 4" in capsys.readouterr().out


def test_a_weight_for_each_output_is_asked_for(outs, capsys):
    folder, *_ = outs
    assert main(["blend", str(folder / "first"), "--weights", "1", "2"]) == 2
    assert "--weights" in capsys.readouterr().err
