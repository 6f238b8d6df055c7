"""Runs that SIGKILL ends again and again leave what an undisturbed run leaves; `make kill-test` kills 200 processes."""

from __future__ import annotations

import pytest

from faults.kills import prepare, run_kills


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_processes_lose_nothing_change_nothing_and_cost_only_the_parts_in_hand(tiny_job, tmp_path):
    ground = prepare(tiny_job(tmp_path))
    tally = run_kills(ground, num_kills=20, seed=0, with_scheduler=False, kills_per_round=8)
    assert ground.num_parts > 20
    assert tally.num_kills >= 20
    assert tally.kills["worker"] > 0 < tally.kills["client"]
    assert (tally.lost, tally.differing, tally.unexplained) == (set(), set(), 0)
