"""What does being watched cost: a training step, an idle core, memory?

    python -m benchmarks.overhead               # writes benchmarks/results/, about four minutes
    python -m benchmarks.overhead --quick       # prints only

**Step.** One process trains on one thread, with the rank's own observer in it (`launcher/node/instrument.py`) and an agent's reader that
looks at its page. Steps with the hooks in and with the hooks out (torch's own functions, no hook registered: the bare script) come in
pairs, in an order drawn for each pair; wall and CPU time of each step are taken. The cost is the median over the pairs of (with) -
(without); its interval comes from resampling pairs, in runs of a hundred because neighbours resemble each other. A second column takes the
same pairs with the hooks out in both: what the method itself makes of nothing.

**Idle.** The same script, two ranks that train slowly, under `python -m launcher` and under torchrun, in turns. CPU time and memory of
everything that is not a rank or a descendant of one are read from /proc.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import hardware, versions
from launcher.node import progress
from launcher.node.guardian import descendants_of
from launcher.node.pages import RankPage

RESULT = Path(__file__).parent / "results" / "overhead_2cores_202611.md"
INSTRUMENT = Path(progress.__file__).with_name("instrument.py")
MODELS = (
    ("256 → 256 → 256, batch 64", 256, 64),
    ("768 → 768 → 768, batch 64", 768, 64),
    ("2048 → 2048 → 2048, batch 64", 2048, 64),
)
RUN = 100
"""Pairs that are resampled together."""

IDLE_SCRIPT = """
import os, time, torch
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
def train():
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
train()
with open("part." + os.environ["RANK"], "w") as file: file.write(str(os.getpid()))
os.rename("part." + os.environ["RANK"], "ready." + os.environ["RANK"])
while True:
    train()
    time.sleep(0.05)
"""


@dataclass(frozen=True)
class Estimate:
    """Nanoseconds."""

    middle: float
    low: float
    high: float


@dataclass(frozen=True)
class StepCost:
    name: str
    num_pairs: int
    step_ns: float
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
        bare = (torch.autograd.backward, self._iterator.__next__)
        self._page = RankPage(0, directory)
        namespace: dict[str, Any] = {"__name__": "_observer", "__file__": str(INSTRUMENT)}
        exec(compile(INSTRUMENT.read_text(), str(INSTRUMENT), "exec", dont_inherit=True), namespace)
        namespace["begin"](directory)
        self._ways = {
            False: ({}, *bare),
            True: (dict(self._post_hooks), torch.autograd.backward, self._iterator.__next__),
        }

    def put(self, is_in: bool) -> None:
        hooks, backward, fetch = self._ways[is_in]
        self._post_hooks.clear()
        self._post_hooks.update(hooks)
        self._torch.autograd.backward = backward
        self._iterator.__next__ = fetch

    def look(self) -> int | None:
        """What the agent does once a second."""
        return self._page.sample(os.getpid()).steps


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


def measure(name: str, width: int, batch: int, seconds: float, hooks: Hooks, dice: random.Random) -> StepCost:
    step = training(width, batch)
    hooks.put(False)
    step_s = statistics.median(step()[0] for _ in range(50)) / 1e9
    num_pairs = max(2 * RUN, round(seconds / step_s / 4))
    walls, cpus, nothings, without = [], [], [], []
    for idx in range(num_pairs):
        for second in (True, False):
            took: dict[bool, tuple[int, int]] = {}
            for is_second in dice.sample([False, True], 2):
                hooks.put(is_second and second)
                took[is_second] = step()
            if second:
                walls.append(took[True][0] - took[False][0])
                cpus.append(took[True][1] - took[False][1])
                without.append(took[False][0])
            else:
                nothings.append(took[True][0] - took[False][0])
        if idx % 500 == 0:
            hooks.look()
    return StepCost(
        name,
        num_pairs,
        statistics.median(without),
        estimate(walls, dice),
        estimate(cpus, dice),
        estimate(nothings, dice),
    )


def estimate(differences: Sequence[int], dice: random.Random) -> Estimate:
    """Median, and what 95 of 100 medians of resampled runs lie between."""
    runs = [statistics.median(differences[at : at + RUN]) for at in range(0, len(differences) - RUN + 1, RUN)]
    resampled = sorted(statistics.median(dice.choices(runs, k=len(runs))) for _ in range(2000))
    return Estimate(statistics.median(differences), resampled[50], resampled[-51])


@dataclass(frozen=True)
class Idle:
    """Of one process, or of several together."""

    num_processes: int
    cpu_percent: float
    rss_mib: float
    pss_mib: float


def idle(command: Sequence[str], seconds: float) -> tuple[Idle, Idle]:
    """The process of the command, and all that it has started but the ranks and theirs."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "train.py").write_text(IDLE_SCRIPT)
        process = subprocess.Popen([sys.executable, *command], cwd=directory, stderr=subprocess.DEVNULL)
        ready = [Path(directory, f"ready.{rank}") for rank in range(2)]
        try:
            while not all(path.exists() for path in ready):
                assert process.poll() is None
                time.sleep(0.1)
            time.sleep(3.0)
            ranks = {int(path.read_text()) for path in ready}
            hidden = ranks.union(*(descendants_of(pid) for pid in ranks))
            own, helpers = [process.pid], sorted(set(descendants_of(process.pid)) - hidden)
            before, began = {pid: _cpu_s(pid) for pid in (*own, *helpers)}, time.monotonic()
            time.sleep(seconds)
            lasted = time.monotonic() - began
            used = {pid: _cpu_s(pid) - cpu_s for pid, cpu_s in before.items()}
            own_idle, helpers_idle = (_account(pids, used, lasted) for pids in (own, helpers))
            return own_idle, helpers_idle
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _account(pids: Sequence[int], used: dict[int, float], lasted: float) -> Idle:
    rss, pss = 0, 0
    for pid in pids:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
        rss, pss = rss + kib["Rss"], pss + kib["Pss"]
    return Idle(len(pids), 100 * sum(used[pid] for pid in pids) / lasted, rss / 1024, pss / 1024)


def _cpu_s(pid: int) -> float:
    """To the nanosecond, of all its threads."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


WAYS = {
    "railhead": ("-m", "launcher", "--standalone", "--nproc-per-node", "2", "train.py"),
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"),
}


def page(
    costs: list[StepCost], idles: dict[str, list[tuple[Idle, Idle]]], seconds: float, load: tuple[float, float]
) -> str:
    return "\n".join(
        [
            "# What being watched costs",
            "",
            "Question: how much longer is a training step with the rank's observer in the process, and what does the launcher "
            "use meanwhile?",
            "",
            f"- Hardware: {hardware()}; load average before and after: {load[0]:.1f}, {load[1]:.1f}",
            f"- Versions: {versions(('torch', 'railhead'))}",
            "- Command: `python -m benchmarks.overhead`; one thread, SGD, a data loader without workers. Pairs of steps with and "
            "without the hooks, the order drawn for each pair. Medians, and 95 % intervals from resampled runs of pairs.",
            "",
            "| model (linear, ReLU, linear) | pairs | step without (µs) | cost, wall (µs) | cost, CPU (µs) | wall, of the step "
            "| the method on nothing (µs) |",
            "|---|---|---|---|---|---|---|",
            *(_cost_row(cost) for cost in costs),
            "",
            *_verdict(costs),
            "",
            f"Two ranks that train, one look a second, {seconds:.0f} s each; {len(idles['railhead'])} runs in turns, medians, and "
            "least to most. PSS: memory that is shared counts in parts.",
            "",
            "| what | processes | CPU (% of a core) | RSS (MiB) | PSS (MiB) |",
            "|---|---|---|---|---|",
            *(
                _idle_row(name, which, [pair[idx] for pair in runs])
                for name, runs in idles.items()
                for idx, which in enumerate(("its own process", "its helpers"))
            ),
            "",
            "Helpers of railhead: a guardian for each rank and for the store, the store's host, and the fork server, which holds torch "
            "for the next attempt and shares most of it with the ranks. torchrun has none.",
            "",
        ]
    )


def _verdict(costs: list[StepCost]) -> list[str]:
    """What can be said of it: the smallest step shows it most exactly, larger ones drown it in their noise."""
    exact = costs[0].wall.middle / 1000
    kept = [cost.name for cost in costs if cost.wall.high <= 0.005 * cost.step_ns]
    lost = [cost.name for cost in costs if cost.wall.high > 0.005 * cost.step_ns]
    return [
        "A step has one hook after the optimizer, one wrapped `__next__`, one wrapped `backward`: some lines of Python, found in a cold "
        f"cache after the products of the step. The smallest step shows their cost most exactly: {exact:.1f} µs, which would be 0.5 % of "
        f"a step of {exact / 5:.1f} ms. In larger steps it drowns in the noise (the last column), and it may be more there, for they leave "
        "less in the cache (the CPU column).",
        "",
        f"Held against 0.5 % of a step, with the upper end of the interval: kept by {' and '.join(kept) or 'none'}; not shown for, or "
        f"missed by, {' and '.join(lost) or 'none'}.",
    ]


def _cost_row(cost: StepCost) -> str:
    return (
        f"| {cost.name} | {cost.num_pairs:,} | {cost.step_ns / 1000:,.0f} | {_in_us(cost.wall)} | {_in_us(cost.cpu)} "
        f"| {100 * cost.wall.middle / cost.step_ns:+.2f} % (to {100 * cost.wall.high / cost.step_ns:+.2f} %) | {_in_us(cost.nothing)} |"
    )


def _in_us(estimate: Estimate) -> str:
    return f"{estimate.middle / 1000:+.2f} ({estimate.low / 1000:+.2f} to {estimate.high / 1000:+.2f})"


def _idle_row(name: str, which: str, runs: list[Idle]) -> str:
    cpu, rss, pss = ([getattr(run, what) for run in runs] for what in ("cpu_percent", "rss_mib", "pss_mib"))
    spread = f"{statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f})"
    numbers = f"{spread} | {statistics.median(rss):.0f} | {statistics.median(pss):.0f}"
    return f"| {name}: {which} | {runs[0].num_processes} | {numbers if runs[0].num_processes else '– | – | –'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    step_s, idle_s, num_runs = (4.0, 4.0, 1) if options.quick else (30.0, 12.0, 3)
    load = os.getloadavg()[0]
    idles: dict[str, list[tuple[Idle, Idle]]] = {name: [] for name in WAYS}
    for _ in range(num_runs):
        for name, command in WAYS.items():
            idles[name].append(idle(command, idle_s))
    with tempfile.TemporaryDirectory() as directory:
        hooks, dice = Hooks(directory), random.Random(0)
        costs = [measure(*model, step_s, hooks, dice) for model in MODELS]
    text = page(costs, idles, idle_s, (load, os.getloadavg()[0]))
    print(text)
    if not options.quick:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
