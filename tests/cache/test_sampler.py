"""The elastic sampler: torch's protocol around a pure order, and a lookahead that tells the cache the truth."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cache.client.announcer import ADVANCE_SAMPLES, LOOKAHEAD_SAMPLES, PORTION_SAMPLES, Announcer
from cache.client.loader import ElasticLoader
from cache.client.sampler import PREFETCHED_BATCHES, ElasticBatchSampler
from cache.order.batches import Cursor
from cache.order.schedule import Schedule
from cache.order.shuffle import Full, Windowed


class Numbers:
    """A data set whose samples are their own numbers."""

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample: int) -> int:
        return sample


def loaded(batches: ElasticLoader) -> list[list[int]]:
    return [batch.tolist() for batch in batches]


# --- the order ------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3), st.sampled_from([True, False, "windowed:1"]))
def test_ranks_together_yield_the_global_batches(world_size: int, epoch: int, shuffle: bool | str) -> None:
    samplers = [
        ElasticBatchSampler(100, 12, seed=4, rank=rank, world_size=world_size, shuffle=shuffle)
        for rank in range(world_size)
    ]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    together = [list(itertools.chain(*batches)) for batches in zip(*samplers, strict=True)]
    alone = ElasticBatchSampler(100, 12, seed=4, shuffle=shuffle)
    alone.set_epoch(epoch)
    assert together == list(alone)
    assert len(together) == len(alone) == 8


def test_each_epoch_follows_the_last_even_if_nobody_sets_it() -> None:
    """With a DistributedSampler, a forgotten set_epoch repeats one order for ever, and nobody notices."""
    sampler = ElasticBatchSampler(40, 8, seed=1)
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.set_epoch(0)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) == second


def test_setting_the_resumed_epoch_does_not_lose_the_step() -> None:
    """`for epoch in range(start, n): sampler.set_epoch(epoch)` is what every script has; after a resume it must not
    rewind."""
    sampler = ElasticBatchSampler(40, 8, seed=1)
    sampler.set_epoch(2)
    whole = list(sampler)
    resumed = ElasticBatchSampler(40, 8, seed=1)
    resumed.load_state_dict({**sampler.state_dict(3), "epoch": 2, "step": 3})
    resumed.set_epoch(2)
    assert resumed.step == 3
    assert list(resumed) == whole[3:]
    assert len(resumed) == len(whole)


def test_state_belongs_to_the_loop_and_not_to_what_was_prefetched() -> None:
    """The sampler is exhausted while the loop is at step 2: what is saved is what the loop says."""
    sampler = ElasticBatchSampler(40, 8, seed=1)
    batches = list(sampler)
    resumed = ElasticBatchSampler(40, 8, seed=1)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict(steps_consumed=2))))
    assert (resumed.epoch, resumed.step) == (0, 2)
    assert list(resumed) == batches[2:]


def test_state_at_the_end_of_an_epoch_is_the_start_of_the_next() -> None:
    sampler = ElasticBatchSampler(40, 8)
    state = sampler.state_dict(steps_consumed=5)
    assert (state["epoch"], state["step"]) == (1, 0)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (ElasticBatchSampler(48, 8, seed=1), "num_samples was 40, is 48"),
        (ElasticBatchSampler(40, 4, seed=1), "global_batch_size was 8, is 4"),
        (ElasticBatchSampler(40, 8, seed=2), "seed was 1, is 2"),
        (ElasticBatchSampler(40, 8, seed=1, shuffle=Windowed(3)), "shuffle was 'full', is 'windowed:3'"),
    ],
)
def test_state_of_another_order_is_refused_with_what_differs(other: ElasticBatchSampler, difference: str) -> None:
    """Going on at step 3 of another order would repeat some samples and skip others, in silence."""
    with pytest.raises(ValueError, match=difference):
        other.load_state_dict(ElasticBatchSampler(40, 8, seed=1).state_dict(3))


def test_resuming_with_another_world_size_is_allowed() -> None:
    state = ElasticBatchSampler(40, 8, seed=1, rank=1, world_size=2).state_dict(3)
    resumed = ElasticBatchSampler(40, 8, seed=1, rank=3, world_size=4)
    resumed.load_state_dict(state)
    assert list(resumed) == list(ElasticBatchSampler(40, 8, seed=1, rank=3, world_size=4))[3:]


def test_a_batch_that_ranks_cannot_share_is_refused_when_the_sampler_is_made() -> None:
    with pytest.raises(ValueError, match="cannot be shared equally by 3 ranks"):
        ElasticBatchSampler(40, 8, rank=0, world_size=3)


# --- the loader -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_state_is_that_of_the_loop_at_every_step(num_workers: int) -> None:
    """Workers are some batches ahead; a resume from any step must give the batches that the loop has not had."""
    reference = [batch.tolist() for batch in itertools.chain(*(loader_over(24, 4) for _ in range(1)))]
    loader = loader_over(24, 4, num_workers=num_workers)
    for step, _ in enumerate(loader):
        resumed = loader_over(24, 4)
        resumed.load_state_dict(loader.state_dict())
        if step < 5:
            assert loaded(resumed) == reference[step + 1 :]
        assert (loader.epoch, loader.step) == (0, step + 1)
    assert (loader.epoch, loader.step) == (1, 0)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_leaving_a_loop_early_keeps_the_place(options: dict[str, Any]) -> None:
    reference = loaded(loader_over(24, 4))
    loader = loader_over(24, 4, **options)
    first = [batch.tolist() for batch in itertools.islice(loader, 2)]
    assert first + loaded(loader) == reference
    assert loader.epoch == 1


def test_loader_follows_set_epoch_of_its_sampler() -> None:
    sampler = ElasticBatchSampler(24, 4, seed=3)
    loader = ElasticLoader(Numbers(24), sampler)  # type: ignore[arg-type]
    epochs = []
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        epochs.append(loaded(loader))
    fresh = ElasticBatchSampler(24, 4, seed=3)
    for epoch, batches in zip((0, 1, 5), epochs, strict=True):
        fresh.set_epoch(epoch)
        assert batches == list(fresh)


def test_loader_counts_what_it_handed_out() -> None:
    loader = loader_over(24, 4)
    loaded(loader)
    loaded(loader)
    assert loader.num_batches == 12
    assert loader.wait_s > 0


def loader_over(num_samples: int, batch: int, **options: Any) -> ElasticLoader:
    return ElasticLoader(Numbers(num_samples), ElasticBatchSampler(num_samples, batch, seed=3), **options)  # type: ignore[arg-type]


# --- the lookahead --------------------------------------------------------------------------------------------------------------


class RecordingStream:
    def __init__(self) -> None:
        self.visits: list[tuple[str, int, int]] = []
        self.num_behind = 0
        self.is_closed = False
        self.num_messages = 0
        self.outlines: list[dict[str, Any]] = []

    def outline(self, order: Mapping[str, Any], objects: bytes) -> None:
        self.outlines.append(dict(order))

    def announce(self, visits: Sequence[tuple[str, int, int]], etags: Mapping[str, str]) -> None:
        self.visits.extend(visits)
        self.num_messages += 1

    def advance(self, num_visits: int, waited_s: float | None = None) -> None:
        self.waited_s = waited_s
        assert self.num_behind <= num_visits <= len(self.visits)
        self.num_behind = num_visits
        self.num_messages += 1

    def close(self) -> None:
        self.is_closed = True


class RecordingDataset:
    """Sample i is visited `1 + i % 3` times: samples need not have one span each."""

    def __init__(self) -> None:
        self.streams: list[RecordingStream] = []
        self.cache = self

    def stream(self, name: str) -> RecordingStream:
        self.streams.append(RecordingStream())
        return self.streams[-1]

    etags: ClassVar[dict[str, str]] = {}

    def outlined_objects(self) -> bytes:
        return b""

    def visits(self, samples: Any) -> tuple[list[tuple[str, int, int]], Any]:
        counts = 1 + samples % 3
        return [("mem://s", int(sample), part) for sample in samples for part in range(1 + sample % 3)], counts


def expected_visits(
    schedule: Schedule, start: Cursor, rank: int, world_size: int, num_batches: int
) -> list[tuple[str, int, int]]:
    ahead = itertools.islice(schedule.batches(start, rank=rank, world_size=world_size), num_batches)
    return RecordingDataset().visits(np.concatenate([np.empty(0, dtype=np.int64), *(batch for _, batch in ahead)]))[0]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10), st.lists(st.integers(1, 2), min_size=1, max_size=40), st.sampled_from([16, 256, 2048]))
@example(start_step=0, strides=[2] * 8, batch=2048)
def test_announced_future_is_what_will_be_read(start_step: int, strides: list[int], batch: int) -> None:
    """In order, without a gap, over the ends of epochs; what is behind is what was consumed, but for a few samples."""
    schedule = Schedule((2000, 1000), batch, seed=2, shuffle=Full())
    dataset = RecordingDataset()
    start = schedule.plan.after(Cursor(0, 0), start_step)
    announcer = Announcer(dataset, schedule, rank=1, world_size=2, name="test", clock=itertools.count().__next__)  # type: ignore[arg-type]
    announcer.seek(start)
    done = 0
    for stride in strides:
        done += stride
        announcer.consumed(schedule.plan.after(start, done))
    (stream,) = dataset.streams
    num_batches = done + -(-(LOOKAHEAD_SAMPLES + 4 * batch) // (batch // 2))
    future = expected_visits(schedule, start, 1, 2, num_batches)
    assert stream.visits == future[: len(stream.visits)]
    consumed = len(expected_visits(schedule, start, 1, 2, done))
    assert consumed < len(stream.visits) <= len(future)
    assert consumed - 3 * ADVANCE_SAMPLES <= stream.num_behind <= consumed


def test_next_epoch_goes_on_in_the_same_stream_and_a_jump_begins_a_new_one() -> None:
    schedule = Schedule((800,), 8, seed=2)
    dataset = RecordingDataset()
    announcer = Announcer(dataset, schedule, rank=0, world_size=1, name="test")  # type: ignore[arg-type]
    announcer.seek(Cursor(0, 0))
    for step in range(1, 101):
        announcer.consumed(Cursor(0, step))
    announcer.seek(Cursor(1, 0))
    assert len(dataset.streams) == 1
    announcer.seek(Cursor(90, 3))
    assert [stream.is_closed for stream in dataset.streams] == [True, False]
    told = [stream.outlines[0]["first_step"] for stream in dataset.streams]
    assert told == [0, 90 * 100 + 3], "the function of the order holds from where the stream begins"
    assert (
        dataset.streams[1].visits
        == expected_visits(schedule, Cursor(90, 3), 0, 1, 1100)[: len(dataset.streams[1].visits)]
    )
    announcer.close()
    assert dataset.streams[1].is_closed


def test_a_reader_beyond_what_was_announced_begins_a_new_stream() -> None:
    """Counting on in the old one would shift every later visit."""
    schedule = Schedule((100_000,), 8, seed=2)
    dataset = RecordingDataset()
    announcer = Announcer(dataset, schedule, rank=0, world_size=1, name="test")  # type: ignore[arg-type]
    announcer.seek(Cursor(0, 0))
    announcer.consumed(Cursor(0, 5000))
    assert [stream.is_closed for stream in dataset.streams] == [True, False]
    assert dataset.streams[1].visits[0] == expected_visits(schedule, Cursor(0, 5000), 0, 1, 1)[0]


def test_tiny_batches_do_not_cost_a_message_each() -> None:
    schedule = Schedule((10_000,), 1, seed=2)
    dataset = RecordingDataset()
    announcer = Announcer(dataset, schedule, rank=0, world_size=1, name="test", clock=itertools.count().__next__)  # type: ignore[arg-type]
    announcer.seek(Cursor(0, 0))
    for step in range(1, 4097):
        announcer.consumed(Cursor(0, step))
    assert dataset.streams[0].num_messages <= 4096 // ADVANCE_SAMPLES + 40


def test_a_reader_of_resident_data_does_not_wake_the_daemon_all_the_time() -> None:
    """It passes 64 samples in 2 ms; on a machine whose cores are all taken, each message is the daemon's turn instead of its own."""
    schedule = Schedule((10_000,), 16, seed=2)
    dataset, now_s = RecordingDataset(), 0.0
    announcer = Announcer(dataset, schedule, rank=0, world_size=1, name="test", clock=lambda: now_s)  # type: ignore[arg-type]
    announcer.seek(Cursor(0, 0))
    (stream,) = dataset.streams
    announced = stream.num_messages
    for step in range(1, 41):
        now_s = step * 0.0005
        announcer.consumed(Cursor(0, step))
    assert stream.num_messages - announced <= 2 + 40 * 16 // PORTION_SAMPLES
    assert stream.num_behind == len(expected_visits(schedule, Cursor(0, 0), 0, 1, ADVANCE_SAMPLES // 16))
    now_s = 0.05
    announcer.consumed(Cursor(0, 41))
    assert stream.num_behind == len(expected_visits(schedule, Cursor(0, 0), 0, 1, 41)), "and then all of it"


def test_plain_dataloader_keeps_what_it_prefetched_announced() -> None:
    """Nobody tells the sampler what was read: what a DataLoader may still hold in its workers must not be given up."""
    assert PREFETCHED_BATCHES >= 16 * 2


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_says_how_long_its_loop_waited_where_workers_read(num_workers: int) -> None:
    """Workers of a starved loop wait all the time, and those of one that is not wait for the loop: only the loop knows what it lost."""
    sampler = ElasticBatchSampler(32, 4, rank=0, world_size=1)
    said: list[float | None] = []
    sampler.consumed = lambda epoch, step, waited_s=None: said.append(waited_s)  # type: ignore[method-assign]
    loader = ElasticLoader(list(range(32)), sampler, num_workers=num_workers)  # type: ignore[arg-type]
    assert len(list(loader)) == len(said) == 8
    waits = [waited_s for waited_s in said if waited_s is not None]
    assert waits == sorted(waits) and len(waits) == (8 if num_workers else 0)
