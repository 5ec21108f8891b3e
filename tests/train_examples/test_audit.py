"""The audit finds what it is for: samples seen twice or not at all, through any history of starts and resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.order.batches import Cursor
from cache.order.schedule import Schedule
from train_examples.audit import AuditLog, findings, read_history

JOB = Schedule((26,), global_batch_size=6, seed=1)


def start(directory: Path, start_id: int, begin: Cursor, num_steps: int, world_size: int, job: Schedule = JOB) -> None:
    """Records what one start of a job trains on."""
    for rank in range(world_size):
        log = AuditLog(
            str(directory),
            start_id=start_id,
            rank=rank,
            world_size=world_size,
            num_samples=job.plan.num_samples,
            global_batch_size=job.global_batch_size,
            start_epoch=begin.epoch,
            start_step=begin.step,
        )
        batches = job.batches(begin, rank=rank, world_size=world_size)
        for _ in range(num_steps):
            place, samples = next(batches)
            log.record(place.epoch, place.step, samples.tolist(), 0.5)
        log.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 3]), st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=5))
def test_resumes_and_resizes_pass(tmp_path_factory: pytest.TempPathFactory, starts: list[tuple[int, int, int]]) -> None:
    """Each start goes on from a checkpoint that lies some steps before the end of the last one."""
    directory = tmp_path_factory.mktemp("audit")
    begin = 0
    for start_id, (world_size, num_steps, num_lost) in enumerate(starts):
        start(directory, start_id, JOB.plan.after(Cursor(0, 0), begin), num_steps, world_size)
        begin += max(0, num_steps - num_lost)
    assert findings(read_history(directory)) == []


def test_a_resume_at_the_wrong_step_is_found(tmp_path: Path) -> None:
    start(tmp_path, 0, Cursor(0, 0), 2, 2)
    start(tmp_path, 1, Cursor(0, 3), 4, 2)
    assert findings(read_history(tmp_path)) == ["epoch 0: 1 steps are missing, the first is 2"]


def test_an_order_that_changed_at_a_resume_is_found(tmp_path: Path) -> None:
    start(tmp_path, 0, Cursor(0, 0), 2, 2)
    start(tmp_path, 1, Cursor(0, 2), 4, 2, Schedule((26,), 6, seed=2))
    assert any("were trained on more than once" in finding for finding in findings(read_history(tmp_path)))


def test_a_rank_that_trained_on_another_ranks_share_is_found(tmp_path: Path) -> None:
    start(tmp_path, 0, Cursor(0, 0), 4, 2)
    first, second = sorted(tmp_path.iterdir())
    second.write_text(first.read_text().replace('"rank": 0', '"rank": 1'))
    assert findings(read_history(tmp_path)) == [
        "epoch 0: 12 samples were trained on more than once, the first is " + str(lowest_of_rank_0())
    ]


def lowest_of_rank_0() -> int:
    batches = JOB.batches(Cursor(0, 0), rank=0, world_size=2)
    return min(sample for _ in range(4) for sample in next(batches)[1].tolist())


def test_a_line_that_a_kill_cut_short_is_not_read(tmp_path: Path) -> None:
    start(tmp_path, 0, Cursor(0, 0), 3, 1)
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text()[:-5])
    assert set(read_history(tmp_path).steps) == {(0, 0), (0, 1)}


def test_records_of_another_data_set_are_refused(tmp_path: Path) -> None:
    start(tmp_path, 0, Cursor(0, 0), 1, 1)
    start(tmp_path, 1, Cursor(0, 0), 1, 1, Schedule((30,), 6))
    with pytest.raises(ValueError, match="different data sets"):
        read_history(tmp_path)


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    """'Nothing found' must not read like 'nothing wrong'."""
    with pytest.raises(ValueError, match="holds no records"):
        read_history(tmp_path)
