"""What does being watched cost: a training step, an idle core, memory?

    python -m benchmarks.overhead               # writes benchmarks/results/
    python -m benchmarks.overhead --quick       # fewer blocks, prints only

**Step.** One process trains on one thread, with the rank's own observer in it (`launcher/node/instrument.py`) and an agent's reader that
looks at its page. Blocks of steps with the hooks in and with the hooks out (torch's own functions, no hook registered: the bare script)
take turns, in an order drawn for each pair. The cost is the median over the pairs of (median step with) - (median step without); its
interval comes from resampling pairs. **Idle.** `python -m launcher` runs two ranks that train slowly; CPU time and memory of the
launcher's process are read from /proc.
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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import hardware, versions
from launcher.node import progress
from launcher.node.pages import RankPage

RESULT = Path(__file__).parent / "results" / "overhead_2cores_202611.md"
INSTRUMENT = Path(progress.__file__).with_name("instrument.py")
MODELS = (
    ("256 → 256 → 256, batch 64", 256, 64),
    ("768 → 768 → 768, batch 64", 768, 64),
    ("2048 → 2048 → 2048, batch 64", 2048, 64),
)

IDLE_SCRIPT = """
import time, torch
model = torch.nn.Linear(8, 8)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
open("ready." + __import__("os").environ["RANK"], "w").close()
while True:
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    time.sleep(0.05)
"""


@dataclass(frozen=True)
class StepCost:
    name: str
    step_us: float
    cost_us: float
    low_us: float
    high_us: float

    @property
    def percent(self) -> float:
        return 100 * self.cost_us / self.step_us


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


def training(width: int, batch: int) -> Callable[[int], list[float]]:
    """Trains so many steps, and says how long each took."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    torch.set_num_threads(1)
    model = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, width))
    optimizer = torch.optim.SGD(model.parameters(), 0.001)
    loader = DataLoader(TensorDataset(torch.randn(batch * 10_000 // 100, width)), batch_size=batch)

    def train(num_steps: int) -> list[float]:
        took, done = [], 0
        while done < num_steps:
            began = time.perf_counter()
            for (x,) in loader:
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                ended = time.perf_counter()
                took.append(ended - began)
                began = ended
                done += 1
        return took[:num_steps]

    return train


def measure(name: str, width: int, batch: int, num_pairs: int, hooks: Hooks, dice: random.Random) -> StepCost:
    train = training(width, batch)
    num_steps = max(20, min(1000, round(0.25 / statistics.median(train(30)))))
    differences, without = [], []
    for _ in range(num_pairs):
        medians = {}
        for is_in in dice.sample([False, True], 2):
            hooks.put(is_in)
            medians[is_in] = 1e6 * statistics.median(train(num_steps))
            hooks.look()
        differences.append(medians[True] - medians[False])
        without.append(medians[False])
    resampled = sorted(statistics.median(dice.choices(differences, k=num_pairs)) for _ in range(2000))
    return StepCost(name, statistics.median(without), statistics.median(differences), resampled[50], resampled[-51])


@dataclass(frozen=True)
class Idle:
    cpu_percent: float
    rss_mib: float
    pss_mib: float
    seconds: float


def idle(seconds: float) -> Idle:
    """The launcher's own process while two ranks train."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "train.py").write_text(IDLE_SCRIPT)
        command = [sys.executable, "-m", "launcher", "--nproc-per-node", "2", "train.py"]
        launcher = subprocess.Popen(command, cwd=directory, stderr=subprocess.DEVNULL)
        try:
            while not all(Path(directory, f"ready.{rank}").exists() for rank in range(2)):
                assert launcher.poll() is None
                time.sleep(0.1)
            time.sleep(2.0)
            before, began = _cpu_s(launcher.pid), time.monotonic()
            time.sleep(seconds)
            used, lasted = _cpu_s(launcher.pid) - before, time.monotonic() - began
            rollup = Path(f"/proc/{launcher.pid}/smaps_rollup").read_text().splitlines()
            kib = {line.split(":")[0]: int(line.split()[1]) for line in rollup[1:]}
            return Idle(100 * used / lasted, kib["Rss"] / 1024, kib["Pss"] / 1024, lasted)
        finally:
            launcher.send_signal(signal.SIGTERM)
            launcher.wait(60)


def _cpu_s(pid: int) -> float:
    """To the nanosecond, of all its threads."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def page(costs: list[StepCost], launcher: Idle, num_pairs: int, load: tuple[float, float]) -> str:
    rows = [
        f"| {cost.name} | {cost.step_us:,.0f} | {cost.cost_us:+.2f} | {cost.low_us:+.2f} to {cost.high_us:+.2f} | {cost.percent:+.3f} % |"
        for cost in costs
    ]
    return "\n".join(
        [
            "# What being watched costs",
            "",
            "Question: how much longer is a training step with the rank's observer in the process, and what does the launcher "
            "use meanwhile?",
            "",
            f"- Hardware: {hardware()}; load average before and after: {load[0]:.1f}, {load[1]:.1f}",
            f"- Versions: {versions(('torch', 'railhead'))}",
            f"- Command: `python -m benchmarks.overhead`; {num_pairs} pairs of blocks (with, without; the order drawn), one "
            "thread, SGD, DataLoader without workers.",
            "",
            "| model (linear, ReLU, linear) | step without (µs) | cost (µs) | 95 % interval | of the step |",
            "|---|---|---|---|---|",
            *rows,
            "",
            "Each step: one hook after the optimizer, one wrapped `__next__`, one wrapped `backward`. The cost is a "
            "constant, so the smallest step shows it largest.",
            "",
            "| the launcher's process, two ranks training, one look a second | |",
            "|---|---|",
            f"| CPU | {launcher.cpu_percent:.2f} % of a core, over {launcher.seconds:.0f} s |",
            f"| resident memory | {launcher.rss_mib:.0f} MiB ({launcher.pss_mib:.0f} MiB in proportion to what others share) |",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--pairs", type=int, default=120)
    options = parser.parse_args()
    num_pairs = 20 if options.quick else options.pairs
    load = os.getloadavg()[0]
    launcher = idle(5.0 if options.quick else 30.0)
    with tempfile.TemporaryDirectory() as directory:
        hooks, dice = Hooks(directory), random.Random(0)
        costs = [measure(*model, num_pairs, hooks, dice) for model in MODELS]
    text = page(costs, launcher, num_pairs, (load, os.getloadavg()[0]))
    print(text)
    if not options.quick:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
