"""A node with GPUs ends an attempt only when the memory of its dead ranks is free, or says what is held. NVML is a fake here."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.cluster.local import LocalCluster
from launcher.gang.events import AttemptEnded, Notice, RanksStarted
from launcher.node import agent
from launcher.node.gpu_memory import GpuMemory, GpuProof, read, still_held
from tests.contracts.cluster_contract import House

IDLE = (GpuMemory(0, 1 << 20, frozenset()), GpuMemory(1, 1 << 20, frozenset({5})))


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    house = House(lambda: LocalCluster(1), tmp_path, 1)
    yield house
    house.cluster.close()


class FakeNvml:
    """Two GPUs; the second one has fallen off the bus."""

    def __init__(self, has_driver: bool = True) -> None:
        self.has_driver = has_driver
        self.num_open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        if not self.has_driver:
            raise RuntimeError("driver not loaded")
        self.num_open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.num_open -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802
        if index == 1:
            raise RuntimeError("GPU is lost")
        return index

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:  # noqa: N802
        return SimpleNamespace(used=7)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[Any]:  # noqa: N802
        return [SimpleNamespace(pid=71)]


def test_gpus_that_answer_are_read_and_nvml_is_given_back() -> None:
    nvml = FakeNvml()
    assert read(nvml) == (GpuMemory(0, 7, frozenset({71})),)
    assert nvml.num_open == 0
    assert read(FakeNvml(has_driver=False)) == ()


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (IDLE, ()),
        ((GpuMemory(0, 9 << 30, frozenset({71})), IDLE[1]), ("process 71 is dead and still holds memory",)),
        ((GpuMemory(0, 9 << 30, frozenset()), IDLE[1]), ("no process is shown that uses them",)),
        ((GpuMemory(0, (1 << 20) + 1000, frozenset()), IDLE[1]), ()),  # the driver's own
        ((IDLE[0], GpuMemory(1, 9 << 30, frozenset({5}))), ()),  # somebody else's job has grown
        ((GpuMemory(7, 9 << 30, frozenset()),), ()),  # a GPU of which nothing was known
    ],
)
def test_memory_is_held_by_our_dead_or_by_nobody_that_is_shown(now: tuple[GpuMemory, ...], words: tuple[str]) -> None:
    held = still_held(IDLE, now, {71, 72})
    assert len(held) == len(words)
    assert all(word in text for word, text in zip(words, held, strict=True))


def test_it_is_asked_until_the_memory_is_free() -> None:
    taken = (GpuMemory(0, 9 << 30, frozenset({71})),)
    answers = [IDLE, taken, taken, IDLE]
    heard: queue.Queue[str] = queue.Queue()
    GpuProof(lambda: answers.pop(0), patience_s=60.0).wait_until_free({71}, heard.put)
    assert heard.get(timeout=30) == ""
    assert not answers


def test_an_nvml_that_hangs_holds_up_nobody_for_long() -> None:
    is_over = threading.Event()

    def ask() -> tuple[GpuMemory, ...]:
        is_over.wait(60)
        return IDLE

    heard: queue.Queue[str] = queue.Queue()
    GpuProof(ask, patience_s=0.1).wait_until_free({71}, heard.put)
    assert heard.get(timeout=30) == "NVML does not answer"
    is_over.set()


def test_an_attempt_is_over_when_the_gpus_are_free(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next attempt begins after AttemptEnded, so nothing may be said before."""
    pids: set[int] = set()
    is_free = threading.Event()
    asked = threading.Event()

    def ask() -> tuple[GpuMemory, ...]:
        if not pids:
            return IDLE
        asked.set()
        return IDLE if is_free.is_set() else (GpuMemory(0, 9 << 30, frozenset(pids)),)

    monkeypatch.setattr(agent, "GpuProof", lambda: GpuProof(ask, patience_s=60.0))
    world = house.begin("wait")
    house.start(world)
    pids.update(house.sink.wait_for(RanksStarted)[0].pids)
    house.stop(world)
    assert asked.wait(30)
    assert not house.sink.of(AttemptEnded)
    is_free.set()
    house.sink.wait_for(AttemptEnded)
    assert not house.sink.of(Notice)
