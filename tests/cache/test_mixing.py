"""Mixtures: exact proportions in every window, each data set in whole passes, the same global batches for every number of ranks."""

from __future__ import annotations

import doctest
import io
import tarfile
from collections import Counter
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cache.client import Cache
from cache.client.datasets import ShardDataset
from cache.client.formats.tar import TarFormat
from cache.client.loader import ElasticLoader
from cache.client.mixed import MixedDataset
from cache.client.sampler import ElasticBatchSampler
from cache.order import mixing
from cache.order.batches import Cursor
from cache.order.mixing import MAX_WINDOW_SAMPLES, Mixture
from cache.order.shuffle import Full, Sequential, Windowed


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    num = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.lists(st.integers(3, 20), min_size=1, max_size=4).map(tuple), min_size=num, max_size=num))
    weights = draw(st.lists(st.integers(1, 6) | st.sampled_from([0.1, 0.25, 1.5]), min_size=num, max_size=num))
    return Mixture(
        tuple(sizes),
        tuple(weights),
        draw(st.sampled_from([1, 2, 3, 6, 12])),
        seed=draw(st.integers(0, 5)),
        shuffle=draw(st.sampled_from([Full(), Sequential(), Windowed(2)])),
        epoch_samples=draw(st.sampled_from([None, 24, 60])),
    )


def owners_of(mixture: Mixture, samples: Any) -> list[int]:
    starts = np.concatenate([[0], np.cumsum(mixture.sizes)])
    return (np.searchsorted(starts, samples, side="right") - 1).tolist()


def first_batches(mixture: Mixture, count: int, **rank: int) -> list[list[int]]:
    return [batch.tolist() for _, batch in islice(mixture.batches(Cursor(0, 0), **rank), count)]


def test_doctests_say_the_truth() -> None:
    assert doctest.testmod(mixing).failed == 0


@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_every_window_has_exactly_the_shares_and_every_batch_nearly(mixture: Mixture) -> None:
    assume(sum(mixture.sizes) >= mixture.global_batch_size and mixture.window_steps < 50)
    batches = first_batches(mixture, 2 * mixture.window_steps)
    for window in (batches[: mixture.window_steps], batches[mixture.window_steps :]):
        seen = Counter(owner for batch in window for owner in owners_of(mixture, batch))
        assert [seen[number] for number in range(len(mixture.sizes))] == list(mixture.counts)
        total = mixture.window_steps * mixture.global_batch_size
        assert [Fraction(count, total) for count in mixture.counts] == list(mixture.shares)
    for batch in batches:
        seen = Counter(owners_of(mixture, batch))
        assert all(
            abs(seen[number] - share * mixture.global_batch_size) < 2 for number, share in enumerate(mixture.shares)
        )


@settings(max_examples=40, deadline=None)
@given(mixtures())
def test_no_sample_comes_twice_before_all_of_its_data_set_have_come_once(mixture: Mixture) -> None:
    assume(sum(mixture.sizes) >= mixture.global_batch_size)
    num_steps = min(100, -(-2 * max(mixture.sizes) * mixture.window_steps // min(mixture.counts)))
    drawn: dict[int, list[int]] = {}
    for batch in first_batches(mixture, num_steps):
        for sample, owner in zip(sorted(batch), owners_of(mixture, sorted(batch)), strict=True):
            drawn.setdefault(owner, []).append(sample)
    for owner, samples in drawn.items():
        passes, rest = divmod(len(samples), mixture.sizes[owner])
        counts = Counter(samples)
        assert set(counts.values()) <= {passes, passes + 1}
        assert sum(count > passes for count in counts.values()) == rest


@settings(max_examples=40, deadline=None)
@given(mixtures(), st.data())
def test_batches_are_the_same_for_any_number_of_ranks_and_any_start(mixture: Mixture, data: st.DataObject) -> None:
    """A resume computes the place and reads nothing; resizing changes who has which part of a batch, not the batch."""
    assume(sum(mixture.sizes) >= mixture.global_batch_size)
    whole = first_batches(mixture, 12)
    sizes = [n for n in (1, 2, 3, 6, 12) if mixture.global_batch_size % n == 0]
    world_size = data.draw(st.sampled_from(sizes))
    parts = [first_batches(mixture, 12, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [[sample for part in parts for sample in part[step]] for step in range(12)] == whole
    step = data.draw(st.integers(0, 11))
    place = Cursor(*divmod(step, mixture.plan.num_steps))
    assert mixture.global_batch(place).tolist() == whole[step]
    found_place, resumed = next(mixture.batches(place))
    assert (found_place, resumed.tolist()) == (mixture.plan.normalised(place), whole[step])


def test_a_mixture_never_changes() -> None:
    """Runs are resumed months later: these are the batches of version 1."""
    mixture = Mixture(((3,), (4, 4)), (0.25, 0.75), 4, seed=7)
    assert first_batches(mixture, 4) == GOLDEN


GOLDEN = [[9, 1, 6, 7], [4, 2, 3, 8], [10, 5, 9, 0], [4, 6, 10, 0]]


def test_two_data_sets_of_one_size_are_walked_in_different_orders() -> None:
    mixture = Mixture(((64,), (64,)), (1, 1), 64)
    batches = first_batches(mixture, 2)
    first = [sample for batch in batches for sample in sorted(batch) if sample < 64]
    orders = [mixture._order(number, 0).samples_at(range(64)).tolist() for number in (0, 1)]
    assert sorted(first) == list(range(64)) and orders[0] != orders[1]


def test_weights_that_cannot_come_out_even_are_rounded_to_a_long_window() -> None:
    mixture = Mixture(((10,), (10,)), (1, 2**0.5), 8)
    total = mixture.window_steps * 8
    assert total <= MAX_WINDOW_SAMPLES and sum(mixture.counts) == total
    assert abs(mixture.counts[1] / total - float(mixture.shares[1])) < 16e-6


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1,), "1 weights for 2 data sets"),
        ((1, 0), "data set 1 has the weight 0"),
        ((1, -1.5), "data set 1 has the weight -1.5"),
        ((1, float("nan")), "data set 1 has the weight nan"),
        ((float("inf"), 1), "data set 0 has the weight inf"),
        ((1, 1e-9), "data set 1 has the weight 1e-09"),
    ],
)
def test_weights_that_cannot_be_are_refused(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(((10,), (10,)), weights, 8)


def test_a_state_of_another_mixture_is_refused() -> None:
    a, b = (Mixture(((8,), (8,)), weights, 4) for weights in ((1, 1), (1, 3)))
    assert a.fingerprint() != b.fingerprint()
    assert Mixture(((8,), (8,)), (2, 2), 4).fingerprint() == a.fingerprint(), "only the proportions matter"


# --- with data ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> MixedDataset:
    cache = Cache("")
    datasets = []
    for name, count in (("a", 12), ("b", 30)):
        for shard in range(2):
            (tmp_path / name).mkdir(exist_ok=True)
            with tarfile.open(tmp_path / name / f"{shard}.tar", "w") as tar:
                for number in range(shard * count // 2, (shard + 1) * count // 2):
                    info = tarfile.TarInfo(f"{name}{number}.bin")
                    info.size = 3
                    tar.addfile(info, io.BytesIO(b"xyz"))
        datasets.append(ShardDataset(cache, f"file://{tmp_path}/{name}", TarFormat(), decode=key_of))
    return MixedDataset(datasets, weights=[1, 3])


def key_of(raw: dict[str, Any]) -> str:
    return str(raw["__key__"])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_mixes_and_resumes(mixed: MixedDataset, num_workers: int) -> None:
    options: dict[str, Any] = {"collate_fn": list, "num_workers": num_workers}
    if num_workers:
        options["multiprocessing_context"] = "fork"

    def loader() -> ElasticLoader:
        return ElasticLoader(mixed, ElasticBatchSampler(mixed, 4, seed=3, announce=not num_workers), **options)

    whole = list(loader())
    assert len(whole) == 10 and all(sum(key.startswith("a") for key in batch) == 1 for batch in whole)
    first = loader()
    for batch, _ in zip(first, range(4), strict=False):
        assert batch in whole
    rest = loader()
    rest.load_state_dict(first.state_dict())
    assert list(rest) == whole[first.step :]
    assert mixed.which(12) == (1, 0) and mixed[12] == "b0"


def test_a_mixture_announces_what_it_will_read_in_its_order(mixed: MixedDataset) -> None:
    samples = np.array([13, 0, 41])
    visits, counts = mixed.visits(samples)
    expected = [mixed.datasets[1].visits(np.array([1])), mixed.datasets[0].visits(np.array([0]))]
    expected.append(mixed.datasets[1].visits(np.array([29])))
    assert visits == [visit for found, _ in expected for visit in found] and counts.tolist() == [1, 1, 1]
    assert set(mixed.etags) == {url for dataset in mixed.datasets for url in dataset.etags}


def test_mixtures_have_no_last_batch_to_fill_and_read_through_one_cache(mixed: MixedDataset) -> None:
    with pytest.raises(ValueError, match="drop_last"):
        ElasticBatchSampler(mixed, 4, drop_last=False)
    with pytest.raises(IndexError, match="data sets of 42"):
        mixed[42]
