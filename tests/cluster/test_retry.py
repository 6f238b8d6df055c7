"""Pauses between the attempts of a task."""

from __future__ import annotations

from softshard.cluster.retry import retry_delay_seconds


def test_pauses_double_differ_and_end_at_a_minute():
    pauses = [
        [retry_delay_seconds(f"part {index}", number, base=2.0) for index in range(50)] for number in (1, 2, 3, 9)
    ]
    for found, longest in zip(pauses, (2.0, 4.0, 8.0, 60.0), strict=True):
        assert longest / 2 <= min(found) < max(found) <= longest
        assert len(set(found)) == 50
    assert retry_delay_seconds("part 7", 2, base=2.0) == pauses[1][7]
