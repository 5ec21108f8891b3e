"""The audit: it says nothing against a history that is right, however often it was broken off, and names what is lost or doubled."""

from __future__ import annotations

import copy
import doctest
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from cache.cli import cli
from cache.client.loader import ElasticLoader
from cache.client.records import BatchRecords, read_records
from cache.client.sampler import ElasticBatchSampler
from cache.errors import FormatError
from cache.order import audit
from cache.order.audit import Stretch, judge, order_from_json, order_to_json
from cache.order.batches import Cursor
from cache.order.mixing import Mixture
from cache.order.schedule import Schedule
from cache.order.shuffle import Windowed

ORDERS: dict[str, Schedule | Mixture] = {
    "full": Schedule((10, 10, 6), 6, seed=3),
    "windowed and filled": Schedule((10, 10, 6), 6, seed=3, shuffle=Windowed(2), drop_last=False),
    "mixed": Mixture(((10, 4), (7,)), (0.7, 0.3), 6, seed=1),
}


def stretch(order: Schedule | Mixture, start: int, world_size: int, begin: int, end: int, number: int = 0) -> Stretch:
    """What a start of so many ranks records from one step of the run up to another."""
    place = Cursor(*divmod(begin, order.plan.num_steps))
    found = Stretch(f"{start:03}", number, world_size, place)
    for step in range(begin, end):
        place = Cursor(*divmod(step, order.plan.num_steps))
        parts = np.split(order.global_batch(place), world_size)
        found.steps[place] = dict(enumerate(parts))
    return found


@pytest.fixture(params=list(ORDERS))
def order(request: pytest.FixtureRequest) -> Schedule | Mixture:
    return ORDERS[request.param]


def test_doctests_say_the_truth() -> None:
    assert doctest.testmod(audit).failed == 0


def test_an_order_survives_being_written_down(order: Schedule | Mixture) -> None:
    again = order_from_json(json.loads(json.dumps(order_to_json(order))))
    places = [Cursor(0, 0), Cursor(1, 2), Cursor(7, 1)]
    assert [again.global_batch(place).tolist() for place in places] == [
        order.global_batch(place).tolist() for place in places
    ]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(list(ORDERS)), st.data())
def test_a_right_history_is_found_right_however_it_was_broken_off(name: str, data: st.DataObject) -> None:
    """Starts of any size that resume at any place that was reached, and are killed after any step, in any rank's middle of it."""
    order = ORDERS[name]
    reached, starts, done = 0, [], 0
    for start in range(data.draw(st.integers(1, 5))):
        begin = data.draw(st.integers(0, reached))
        end = begin + data.draw(st.integers(1, 8))
        world_size = data.draw(st.sampled_from([1, 2, 3, 6]))
        found = stretch(order, start, world_size, begin, end + 1)
        killed_in = Cursor(*divmod(end, order.plan.num_steps))
        for rank in range(data.draw(st.integers(1, world_size))):
            del found.steps[killed_in][rank]
        if not found.steps[killed_in]:
            del found.steps[killed_in]
        starts.append(found)
        reached, done = end, done + end - begin
    verdict = judge(order, data.draw(st.permutations(starts)))
    assert verdict.findings == ()
    assert sum(epoch.num_steps for epoch in verdict.epochs) == reached
    assert verdict.num_void >= done - reached


def damaged(order: Schedule | Mixture, change: Any) -> tuple[str, ...]:
    whole = stretch(order, 0, 2, 0, 2 * order.plan.num_steps)
    broken = copy.deepcopy(whole)
    change(broken.steps)
    return judge(order, [broken]).findings


def test_a_sample_that_was_lost_is_named_with_its_step(order: Schedule | Mixture) -> None:
    lost = int(order.global_batch(Cursor(0, 1))[0])

    def lose(steps: dict[Cursor, dict[int, Any]]) -> None:
        steps[Cursor(0, 1)][0] = steps[Cursor(0, 1)][0][1:]

    (finding,) = damaged(order, lose)
    assert finding == f"epoch 0: sample {lost} was lost; it belongs to step 1, which start 000 recorded without it"


def test_a_sample_that_came_twice_is_named_with_both_places(order: Schedule | Mixture) -> None:
    twice = int(order.global_batch(Cursor(1, 0))[5])

    def double(steps: dict[Cursor, dict[int, Any]]) -> None:
        steps[Cursor(1, 2)][0][0] = twice

    findings = damaged(order, double)
    assert any(
        f"sample {twice} was handed out" in found and "step 2, rank 0 (start 000)" in found for found in findings
    )
    assert any("was lost; it belongs to step 2" in found for found in findings)
    assert all(finding.startswith("epoch 1") for finding in findings)


def test_a_missing_step_is_named_with_its_neighbours() -> None:
    order = ORDERS["full"]
    before, after = stretch(order, 0, 2, 0, 2), stretch(order, 1, 3, 3, 6)
    findings = judge(order, [before, after]).findings
    assert findings[0] == "epoch 0: step 2 was never handed out after step 1 of start 000, before step 3 of start 001"
    assert findings[-1] == "epoch 0: 6 lost and 0 too many in all"


def test_a_rank_without_records_is_named() -> None:
    order = ORDERS["full"]
    found = stretch(order, 0, 3, 0, 6)
    for ranks in found.steps.values():
        del ranks[1]
    findings = judge(order, [found]).findings
    assert any("4 steps, from 0 on, were without the records of some ranks; step 0 lacks rank 1" in f for f in findings)


def test_samples_in_other_batches_are_found_though_each_came_once() -> None:
    def swap(steps: dict[Cursor, dict[int, Any]]) -> None:
        a, b = steps[Cursor(0, 0)], steps[Cursor(0, 1)]
        a[0], b[0] = b[0], a[0]

    (finding,) = damaged(ORDERS["full"], swap)
    assert finding == "epoch 0: 2 steps, from 0 on, were with other samples than the order says, though each came once"


# --- from real loaders ----------------------------------------------------------------------------------------------------------------


class Squares(Dataset[int]):
    def __len__(self) -> int:
        return 26

    def __getitem__(self, sample: int) -> int:
        return sample * sample


def train(directory: Path, start: str, world_size: int, state: Any, num_steps: int, **options: Any) -> Any:
    """All ranks of a start, one after the other; the state after so many steps."""
    for rank in range(world_size):
        sampler = ElasticBatchSampler(26, 6, seed=1, rank=rank, world_size=world_size)
        loader = ElasticLoader(Squares(), sampler, records=BatchRecords(directory, start=start), **options)
        if state is not None:
            loader.load_state_dict(state)
        after, done = state, 0
        while done < num_steps:
            for batch in loader:
                assert len(batch) == 6 // world_size
                done += 1
                after = loader.state_dict()
                if done == num_steps:
                    break
        loader.close()
    return after


@pytest.mark.parametrize("num_workers", [0, 1])
def test_records_of_loaders_prove_exactly_once_across_resumes_and_sizes(tmp_path: Path, num_workers: int) -> None:
    options: dict[str, Any] = {"num_workers": num_workers}
    if num_workers:
        options["multiprocessing_context"] = "fork"
    state = train(tmp_path, "0", 2, None, 3, **options)
    train(tmp_path, "1", 3, state, 4, **options)  # its checkpoint is never written: what it did is void
    train(tmp_path, "2", 1, state, 6, **options)
    run = CliRunner().invoke(cli, ["audit", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert "epoch 0: 4 of 4 steps, 24 different samples, by 1 and 2 ranks\n" in run.output
    assert "4 steps were done again after a resume" in run.output and "every sample exactly once" in run.output
    verdict = json.loads(CliRunner().invoke(cli, ["audit", "--json", str(tmp_path)]).output)
    assert verdict["findings"] == [] and verdict["epochs"][2]["is_finished"] is False


def test_a_record_that_is_changed_afterwards_is_found(tmp_path: Path) -> None:
    train(tmp_path, "0", 2, None, 4)
    path = next(tmp_path.glob("*rank00001.jsonl"))
    lines = path.read_text().splitlines()
    line = json.loads(lines[3])
    line["samples"][0] = 99
    path.write_text("\n".join([*lines[:3], json.dumps(line), *lines[4:]]) + "\n")
    run = CliRunner().invoke(cli, ["audit", str(tmp_path)])
    assert run.exit_code == 1
    assert "WRONG: epoch 0: sample 99 was handed out, and does not belong to these steps: step 1, rank 1" in run.output


def test_a_half_written_line_is_passed_over_and_garbage_is_named(tmp_path: Path) -> None:
    """A rank that was killed while it wrote leaves half a line; whoever damages a file otherwise is told which."""
    train(tmp_path, "0", 1, None, 3)
    path = next(tmp_path.glob("*.jsonl"))
    whole = path.read_text()
    path.write_text(whole[:-10])
    _, stretches = read_records([tmp_path])
    assert len(stretches[0].steps) == 2
    for garbage in ("{}\n", "[]\n", "no json\n", whole + '{"at": [0]}\n', whole.replace('"version":1', '"version":2')):
        path.write_text(garbage)
        with pytest.raises(FormatError, match=path.name):
            read_records([tmp_path])


def test_records_of_different_orders_are_not_mixed_up(tmp_path: Path) -> None:
    for number, seed in enumerate((1, 2)):
        sampler = ElasticBatchSampler(26, 6, seed=seed, rank=0, world_size=1)
        loader = ElasticLoader(Squares(), sampler, records=BatchRecords(tmp_path, start=str(number)))
        next(iter(loader))
    with pytest.raises(FormatError, match="they differ in seed"):
        read_records([tmp_path])


def test_nothing_to_audit_is_an_exit_code_of_its_own(tmp_path: Path) -> None:
    run = CliRunner().invoke(cli, ["audit", str(tmp_path)])
    assert run.exit_code == 2 and "no records" in run.output


def test_a_disk_that_refuses_records_does_not_stop_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "d").write_text("a file where a directory should be")
    train(tmp_path / "d", "0", 1, None, 4)
    assert "batches are no longer recorded" in caplog.text


def test_a_killed_rank_leaves_whole_lines(tmp_path: Path) -> None:
    """Killed without any chance to flush: every batch that the loop had is on record."""
    program = (
        "import os, sys; from tests.cache.test_audit import *\n"
        "loader = ElasticLoader(Squares(), ElasticBatchSampler(26, 6, seed=1, rank=0, world_size=1), records=sys.argv[1])\n"
        "for _ in loader:\n"
        "    if loader.step == 3: os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=100)
    _, (found,) = read_records([tmp_path])
    assert len(found.steps) == 3 and found.world_size == 1
