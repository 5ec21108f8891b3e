"""The time that a watched step spends in what the launcher has put into it. Used by `benchmarks.overhead`.

**Within.** A clock stands before and after each of the three hooks (after the optimizer, around `__next__`, around `backward`), and inside,
where torch's own function begins and ends: what lies between them is ours. Whether the hooks are in is drawn for each step; what the clocks
make of an empty place is taken off. The steps around it are real ones, so ours runs in the cold cache that they leave; their own noise, a
hundred times what is measured, does not enter.

**Pairs.** Whole steps with and without the hooks, in an order drawn for each pair, without those clocks. It also sees what else the hooks
do (they take room in the caches), and all of the machine's noise: the same pairs with the hooks out in both say how much.
"""

from __future__ import annotations

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.node import progress
from launcher.node.pages import RankPage

INSTRUMENT = Path(progress.__file__).with_name("instrument.py")
MODELS = (
    ("256 → 256 → 256, batch 64", 256, 64),
    ("384 → 384 → 384, batch 64", 384, 64),
    ("768 → 768 → 768, batch 64", 768, 64),
    ("2048 → 2048 → 2048, batch 64", 2048, 64),
)
RUN = 50
"""Neighbours that are resampled together, for they resemble each other."""
NUM_RUNS = 10
"""No model is measured in fewer."""


@dataclass(frozen=True)
class Estimate:
    """Nanoseconds."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class StepCost:
    name: str
    num_steps: int
    num_pairs: int
    step_ns: float
    """Without."""
    within: Estimate
    wall: Estimate
    cpu: Estimate
    nothing: Estimate
    """Wall time of pairs in which the hooks were out both times."""


class Hooks:
    """The rank's observer, whose hooks can be taken out and put in again."""

    def __init__(self, directory: str) -> None:
        import torch
        import torch.optim.optimizer as optimizer
        import torch.utils.data.dataloader as dataloader

        self._torch, self._iterator = torch, dataloader._BaseDataLoaderIter
        self._post_hooks = optimizer._global_optimizer_post_hooks
        self._page = RankPage(0, directory)
        namespace: dict[str, Any] = {"__name__": "_observer", "__file__": str(INSTRUMENT)}
        exec(compile(INSTRUMENT.read_text(), str(INSTRUMENT), "exec", dont_inherit=True), namespace)
        observer = namespace["observe"](progress.open_page(directory, writable=True))
        bare: tuple[Callable[..., Any], Callable[..., Any]] = (torch.autograd.backward, self._iterator.__next__)
        self._ways: dict[bool, tuple[Any, Any, Any]] = {
            False: (None, *bare),
            True: (observer.on_step, observer.wrap_backward(bare[0]), observer.wrap_next(bare[1])),
        }
        self.clocks = Clocks()
        inner = [self.clocks.inner(function) for function in bare]
        self._timed: dict[bool, tuple[Any, Any, Any]] = {
            False: (self.clocks.after(None), self.clocks.outer(inner[0]), self.clocks.outer(inner[1])),
            True: (
                self.clocks.after(observer.on_step),
                self.clocks.outer(observer.wrap_backward(inner[0])),
                self.clocks.outer(observer.wrap_next(inner[1])),
            ),
        }

    def put(self, is_in: bool, *, is_timed: bool = False) -> None:
        hook, backward, fetch = (self._timed if is_timed else self._ways)[is_in]
        self._post_hooks.clear()
        if hook is not None:
            self._post_hooks[0] = hook
        self._torch.autograd.backward = backward
        setattr(self._iterator, "__next__", fetch)  # noqa: B010

    def look(self) -> int | None:
        """What the agent does once a second."""
        return self._page.sample(os.getpid()).steps


class Clocks:
    """Before and after what is ours."""

    def __init__(self) -> None:
        self.ours_ns = 0
        self._inner_ns = 0

    def after(self, hook: Callable[..., Any] | None) -> Callable[..., Any]:
        clock = time.perf_counter_ns

        def timed(optimizer: object, args: object, kwargs: object) -> None:
            began_ns = clock()
            if hook is not None:
                hook(optimizer, args, kwargs)
            self.ours_ns += clock() - began_ns

        return timed

    def inner(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """torch's own part."""
        clock = time.perf_counter_ns

        def timed(*args: Any, **kwargs: Any) -> Any:
            began_ns = clock()
            result = function(*args, **kwargs)
            self._inner_ns = clock() - began_ns
            return result

        return timed

    def outer(self, function: Callable[..., Any]) -> Callable[..., Any]:
        clock = time.perf_counter_ns

        def timed(*args: Any, **kwargs: Any) -> Any:
            began_ns = clock()
            result = function(*args, **kwargs)
            self.ours_ns += clock() - began_ns - self._inner_ns
            return result

        return timed


def training(width: int, batch: int) -> Callable[[], tuple[int, int]]:
    """One step; wall and CPU nanoseconds that it took."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, width))
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    loader = DataLoader(TensorDataset(torch.randn(batch * 100, width)), batch_size=batch)
    batches = iter(loader)
    left = len(loader)

    def step() -> tuple[int, int]:
        nonlocal batches, left
        if not left:
            batches, left = iter(loader), len(loader)
        left -= 1
        cpu_ns, wall_ns = time.process_time_ns(), time.perf_counter_ns()
        (x,) = next(batches)
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter_ns() - wall_ns, time.process_time_ns() - cpu_ns

    return step


def measure(name: str, width: int, batch: int, seconds: float, dice: random.Random) -> StepCost:
    with tempfile.TemporaryDirectory() as directory:
        hooks, step = Hooks(directory), training(width, batch)
        hooks.put(False)
        step_s = statistics.median(step()[0] for _ in range(50)) / 1e9
        within = _within(step, hooks, max(2 * NUM_RUNS * RUN, round(seconds / 2 / step_s)), dice)
        num_pairs = max(NUM_RUNS * RUN // 2, round(seconds / 2 / step_s / 4))
        walls, cpus, without = _pairs(step, hooks, num_pairs, True, dice)
        nothings, _, _ = _pairs(step, hooks, num_pairs, False, dice)
        hooks.put(False)
    return StepCost(
        name,
        sum(len(times) for times in within.values()),
        num_pairs,
        statistics.median(without),
        estimate(within[True], dice, within[False]),
        estimate(walls, dice),
        estimate(cpus, dice),
        estimate(nothings, dice),
    )


def _within(step: Callable[[], object], hooks: Hooks, num_steps: int, dice: random.Random) -> dict[bool, list[int]]:
    times: dict[bool, list[int]] = {False: [], True: []}
    for idx in range(num_steps):
        is_in = dice.random() < 0.5
        hooks.put(is_in, is_timed=True)
        hooks.clocks.ours_ns = 0
        step()
        times[is_in].append(hooks.clocks.ours_ns)
        if idx % 500 == 0:
            hooks.look()
    return times


def _pairs(
    step: Callable[[], tuple[int, int]], hooks: Hooks, num_pairs: int, is_in: bool, dice: random.Random
) -> tuple[list[int], list[int], list[int]]:
    """By pair: wall and CPU time of the one with less those of the one without, and the latter's wall time."""
    walls, cpus, without = [], [], []
    for idx in range(num_pairs):
        took: dict[bool, tuple[int, int]] = {}
        for is_second in dice.sample([False, True], 2):
            hooks.put(is_second and is_in)
            took[is_second] = step()
        walls.append(took[True][0] - took[False][0])
        cpus.append(took[True][1] - took[False][1])
        without.append(took[False][0])
        if idx % 500 == 0:
            hooks.look()
    return walls, cpus, without


def estimate(times: Sequence[int], dice: random.Random, less: Sequence[int] = (0,)) -> Estimate:
    """Median, less the other's median, and what 95 of 100 such differences of resampled runs lie between."""
    taken, away = _medians(times), _medians(less)
    resampled = sorted(
        statistics.median(dice.choices(taken, k=len(taken))) - statistics.median(dice.choices(away, k=len(away)))
        for _ in range(2000)
    )
    return Estimate(statistics.median(times) - statistics.median(less), resampled[50], resampled[-51])


def _medians(times: Sequence[int]) -> list[float]:
    return [statistics.median(times[at : at + RUN]) for at in range(0, max(1, len(times) - RUN + 1), RUN)]
