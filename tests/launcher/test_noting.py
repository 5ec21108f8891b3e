"""What of the ranks' progress goes into the journal: enough for an account, little enough for a month."""

from __future__ import annotations

from launcher.gang.observations import NodeProgress, RankSample
from launcher.gang.world import NodeInfo, arrange
from launcher.noting import ProgressNotes

WORLD = arrange([NodeInfo(f"n{idx}", f"host-{idx}", "10.0.0.1", 1) for idx in range(2)], None, 2)


def seen(node_idx: int, steps: int | None, attempt: int = 0) -> NodeProgress:
    return NodeProgress(attempt, f"n{node_idx}", 0.0, (RankSample(node_idx, 1.0, steps=steps),))


def test_the_gang_is_as_far_as_its_slowest_rank() -> None:
    notes = ProgressNotes()
    notes.begin(0, WORLD, 0.0)
    assert notes.progress is None
    notes.see(seen(0, 7))
    notes.see(seen(1, 5))
    assert notes.progress is not None and (notes.progress.steps, notes.progress.num_ranks) == (5, 2)


def test_the_first_steps_are_noted_at_once_and_the_others_now_and_then() -> None:
    notes = ProgressNotes()
    notes.begin(0, WORLD, 0.0)
    noted = []
    for second in range(1, 101):
        notes.see(seen(0, second - 4 if second > 4 else None))
        progress = notes.progress
        assert progress is not None
        if notes.is_due(progress, float(second)):
            noted.append(second)
    assert noted == [1, 5, 15, 25, 35, 45, 55, 65, 75, 85, 95]


def test_a_long_job_is_noted_once_a_minute() -> None:
    notes = ProgressNotes()
    notes.begin(0, WORLD, 0.0)
    notes.see(seen(0, 1))
    assert notes.progress is not None
    num = sum(notes.is_due(notes.progress, float(second)) for second in range(0, 86400, 5))
    assert 1440 <= num <= 2200


def test_what_comes_late_from_an_older_attempt_is_not_taken_for_progress() -> None:
    notes = ProgressNotes()
    notes.begin(0, WORLD, 0.0)
    notes.see(seen(0, 7))
    notes.stop()
    assert notes.progress is None
    notes.begin(1, WORLD, 1.0)
    notes.see(seen(0, 8, attempt=0))
    assert notes.progress is None
