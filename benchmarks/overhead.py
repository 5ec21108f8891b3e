"""What does being watched cost: a training step, an idle core, memory?

    python -m benchmarks.overhead               # writes benchmarks/results/, about four minutes
    python -m benchmarks.overhead --quick       # prints only

**Step.** One process trains on one thread, with the rank's own observer in it (`launcher/node/instrument.py`) and an agent's reader that
looks at its page. How much of a step is the observer's is measured in two ways (`benchmarks/step_cost.py`): by clocks around what is ours,
within real steps, and by pairs of whole steps with the hooks in and out, which see everything and the noise.

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
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import hardware, versions
from benchmarks.processes import Usage, watch
from benchmarks.step_cost import MODELS, Estimate, StepCost, measure
from launcher.node.guardian import descendants_of

RESULT = Path(__file__).parent / "results" / "overhead_2cores_202611.md"
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


def idle(command: Sequence[str], seconds: float) -> tuple[Usage, Usage]:
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
            used = watch({"own": own, "helpers": helpers}, seconds)
            return used["own"], used["helpers"]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


WAYS = {
    "railhead": ("-m", "launcher", "--standalone", "--nproc-per-node", "2", "train.py"),
    "torchrun": ("-m", "torch.distributed.run", "--nproc-per-node", "2", "train.py"),
}


def page(
    costs: list[StepCost], idles: dict[str, list[tuple[Usage, Usage]]], seconds: float, load: tuple[float, float]
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
            "- Command: `python -m benchmarks.overhead`; one thread, SGD, a data loader without workers. Medians, and 95 % intervals from "
            "resampled runs of fifty.",
            "",
            "*Within*: clocks around what is ours, in steps that have it and, drawn for each step, in steps that do not. *Pairs*: "
            "whole steps with less without. *Nothing*: pairs with the hooks out in both, which is what that method makes of nothing.",
            "",
            "| model (linear, ReLU, linear) | step without (µs) | steps; pairs | within (µs) | of the step | pairs, wall (µs) "
            "| pairs, CPU (µs) | nothing (µs) |",
            "|---|---|---|---|---|---|---|---|",
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
    """What can be said of it."""
    highest = max(cost.within.high for cost in costs)
    kept = [cost.name for cost in costs if cost.within.high <= 0.005 * cost.step_ns]
    lost = [cost.name for cost in costs if cost.within.high > 0.005 * cost.step_ns]
    seen = [cost.name for cost in costs if cost.wall.low > cost.nothing.high]
    return [
        "A step has one hook after the optimizer, one wrapped `__next__`, one wrapped `backward`: some lines of Python, found in a cold "
        f"cache after the products of the step. The most that they took within any model is {highest / 1000:.1f} µs (upper "
        f"end), which is 0.5 % of a step of {highest / 5000:.2f} ms.",
        "",
        f"Held against 0.5 % of a step, with the upper end of the interval: kept by {'; '.join(kept) or 'none'}; missed by "
        f"{'; '.join(lost) or 'none'}. Pairs of whole steps tell a cost from nothing for {'; '.join(seen) or 'none'}.",
    ]


def _cost_row(cost: StepCost) -> str:
    share = f"{100 * cost.within.middle / cost.step_ns:.3f} % (to {100 * cost.within.high / cost.step_ns:.3f} %)"
    return (
        f"| {cost.name} | {cost.step_ns / 1000:,.0f} | {cost.num_steps:,}; {cost.num_pairs:,} | {_in_us(cost.within)} | {share} "
        f"| {_in_us(cost.wall)} | {_in_us(cost.cpu)} | {_in_us(cost.nothing)} |"
    )


def _in_us(estimate: Estimate) -> str:
    return f"{estimate.middle / 1000:+.2f} ({estimate.low / 1000:+.2f} to {estimate.high / 1000:+.2f})"


def _idle_row(name: str, which: str, runs: list[Usage]) -> str:
    cpu, rss, pss = ([getattr(run, what) for run in runs] for what in ("cpu_percent", "rss_mib", "pss_mib"))
    spread = f"{statistics.median(cpu):.2f} ({min(cpu):.2f} to {max(cpu):.2f})"
    numbers = f"{spread} | {statistics.median(rss):.0f} | {statistics.median(pss):.0f}"
    return f"| {name}: {which} | {runs[0].num_processes} | {numbers if runs[0].num_processes else '– | – | –'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--steps-only", action="store_true", help="prints what a step costs, and no page")
    options = parser.parse_args()
    step_s, idle_s, num_runs = (4.0, 4.0, 1) if options.quick else (30.0, 12.0, 3)
    load = os.getloadavg()[0]
    if options.steps_only:
        for model in MODELS:
            print(_cost_row(measure(*model, step_s, random.Random(0))), flush=True)
        return
    idles: dict[str, list[tuple[Usage, Usage]]] = {name: [] for name in WAYS}
    for _ in range(num_runs):
        for name, command in WAYS.items():
            idles[name].append(idle(command, idle_s))
    dice = random.Random(0)
    costs = [measure(*model, step_s, dice) for model in MODELS]
    text = page(costs, idles, idle_s, (load, os.getloadavg()[0]))
    print(text)
    if not options.quick:
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
