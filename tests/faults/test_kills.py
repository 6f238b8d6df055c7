"""Runs that SIGKILL ends again and again leave what an undisturbed run leaves; `make kill-test` kills 200 processes."""

from __future__ import annotations

import pytest

from faults.kills import prepare, run_kills


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_kills", "kills_per_round"), [pytest.param(2, 1, id="2"), pytest.param(20, 8, id="20", marks=pytest.mark.slow)]
)
def test_killed_processes_lose_nothing_change_nothing_and_cost_only_the_parts_in_hand(
    tiny_job, tmp_path, num_kills, kills_per_round
):
    ground = prepare(tiny_job(tmp_path))
    tally = run_kills(ground, num_kills=num_kills, seed=0, with_scheduler=False, kills_per_round=kills_per_round)
    assert ground.num_parts > 20
    assert tally.num_kills >= num_kills
    assert tally.kills["worker"] > 0 < tally.kills["client"]
    assert (tally.lost, tally.differing, tally.unexplained) == (set(), set(), 0)
