"""The simulator runs the product's own machine: what it predicts must agree with arithmetic where arithmetic knows the answer."""

from __future__ import annotations

import doctest

import pytest

from benchmarks import simulate
from benchmarks.simulation import Data, EpochResult, Job, Node, Simulation

DATA = Data(num_shards=40, samples_per_shard=8, sample_bytes=192 * 1024)
SAMPLES_PER_S = 640.0
NEED = DATA.sample_bytes * SAMPLES_PER_S


def epochs(cached_share: float, origin_share: float, **job: object) -> tuple[list[EpochResult], Simulation]:
    node = Node(int(cached_share * DATA.num_bytes), origin_share * NEED)
    simulation = Simulation(node, [Job(DATA, SAMPLES_PER_S, **job)])  # type: ignore[arg-type]
    return simulation.run()[0], simulation


def test_doctests_say_the_truth() -> None:
    assert doctest.testmod(simulate).failed == 0


@pytest.mark.parametrize("shuffle", ["full", "windowed:2", "sequential"])
def test_what_fits_is_fetched_once_and_never_waited_for_again(shuffle: str) -> None:
    found, _ = epochs(1.2, 0.5, shuffle=shuffle)
    assert [epoch.origin_bytes for epoch in found] == [DATA.num_bytes, 0, 0]
    assert [epoch.utilisation for epoch in found[1:]] == pytest.approx([1.0, 1.0])
    assert found[0].utilisation == pytest.approx(0.5, abs=0.06), "cold, the origin sets the pace"


@pytest.mark.parametrize("cached_share", [0.3, 0.6])
def test_half_a_cache_fetches_no_more_than_the_data_and_keeps_its_bound(cached_share: float) -> None:
    found, simulation = epochs(cached_share, 0.5, shuffle="windowed:1")
    assert simulation.peak_bytes <= cached_share * DATA.num_bytes
    for epoch in found[1:]:
        assert (1 - cached_share) * 0.95 * DATA.num_bytes <= epoch.origin_bytes < DATA.num_bytes


def test_the_same_question_has_the_same_answer() -> None:
    assert epochs(0.5, 0.5, shuffle="windowed:2")[0] == epochs(0.5, 0.5, shuffle="windowed:2")[0]


def test_a_cold_full_shuffle_at_twice_the_need_is_hardly_waited_for() -> None:
    """The reason for small blocks (decisions/0060): with 4 MiB a reader waited for most of the data set."""
    found, _ = epochs(1.2, 2.0, shuffle="full", num_epochs=1)
    assert found[0].utilisation > 0.85


def test_the_command_prints_every_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "--data 30MB --shards 20 --cache 15MB --origin 60MB --need 126MB --epochs 2 --jobs 2 --shuffle windowed:1"
    )
    assert simulate.main(arguments.split()) == 0
    assert capsys.readouterr().out.count("\n| ") == 4
