"""How long does a preflight take, whom does it name, and what does looking at the hardware cost a start?

    python -m benchmarks.preflight                # all, 7 runs; writes benchmarks/results/
    python -m benchmarks.preflight --quick        # 2 runs, printed only

The gang is eight network namespaces of this machine with links of 200 Mb/s (root and `ip` are needed; left out and said otherwise).
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import hardware, versions
from benchmarks.namespaces import network, why_not
from benchmarks.preflight_model import NoisyNetwork, NoisyReduces
from launcher.fabric.conduct import READY_S, Wishes, conduct

RESULT = Path(__file__).parent / "results" / "preflight_2cores_202611.md"

NUM_NODES = 8
RATE_MBIT = 200
NUM_SEEDS = 200
SLOW_NODE = 5

# The launcher as it is, and with the survey of the hardware switched off: the difference is what it costs.
PLAIN = "import sys; from launcher.cli import main; sys.exit(main(sys.argv[1:]))"
BLIND = "import launcher.node.survey as survey; survey.Survey.begin = lambda self: None; " + PLAIN


@dataclass(frozen=True)
class Check:
    """One preflight of the gang."""

    start_s: float
    """Until every node's processes are up and have loaded torch."""
    network_s: float
    """Connections, datagrams, transfers."""
    whole_s: float
    """The same with all-reduces."""
    named: tuple[str, ...]


def check_once(slow_node: int | None) -> Check:
    hosts = [f"host{node}" for node in range(NUM_NODES)]
    environments = [{"GLOO_SOCKET_IFNAME": "eth0"}] * NUM_NODES
    with network(NUM_NODES, RATE_MBIT) as nodes:
        if slow_node is not None:
            nodes.limit(slow_node, RATE_MBIT // 2)
        began_s = time.monotonic()
        with nodes.peers() as peers:
            for peer, env in zip(peers, environments, strict=True):
                peer.prepare(env)
            for peer in peers:
                assert not peer.ready(READY_S).problem
            up_s = time.monotonic()
            first = conduct(peers, hosts)
            middle_s = time.monotonic()
            report = conduct(peers, hosts, Wishes(reduce=True, environments=environments))
            end_s = time.monotonic()
    named = tuple(f"{finding.id} {', '.join(finding.nodes)}" for finding in (*first.findings, *report.findings))
    return Check(up_s - began_s, middle_s - up_s, end_s - middle_s, named)


@dataclass(frozen=True)
class Judgement:
    """Over NUM_SEEDS drawn gangs of 4 to 33 nodes."""

    what: str
    num_found: int
    num_accused: int
    """Healthy nodes and links that were named."""


def judge_all() -> list[Judgement]:
    found = []
    for what, kind in (("transfers", NoisyNetwork), ("all-reduces of pairs", NoisyReduces)):
        num_found = num_accused = num_wrong = 0
        for seed in range(NUM_SEEDS):
            num_nodes = random.Random(seed).randint(4, 33)
            rates = [3e9] * num_nodes
            slow = seed % num_nodes
            rates[slow] *= random.Random(seed + 1).uniform(0.1, 0.6)
            verdict = kind(rates, seed).verdict()
            num_found += slow in verdict.nodes
            num_accused += len(set(verdict.nodes) - {slow})
            healthy = kind([3e9] * num_nodes, seed).verdict()
            num_wrong += len(healthy.nodes) + len(healthy.links)
        found.append(Judgement(f"{what}, one node at 10–60 %", num_found, num_accused))
        found.append(Judgement(f"{what}, all healthy", 0, num_wrong))
    return found


def start_once(code: str, directory: Path) -> float:
    """The whole command of two ranks that do nothing."""
    began_s = time.monotonic()
    command = [sys.executable, "-c", code, "--nproc-per-node=2", "--no-python", "true"]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)
    return time.monotonic() - began_s


def measure_starts(num_rounds: int, directory: Path) -> tuple[list[float], list[float]]:
    """With and without the survey, taking turns; the first of each is not counted."""
    pairs = [(start_once(PLAIN, directory), start_once(BLIND, directory)) for _ in range(num_rounds + 1)][1:]
    return [one for one, _ in pairs], [other for _, other in pairs]


def spread(values: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def render(
    healthy: Sequence[Check],
    slow: Sequence[Check],
    judged: Sequence[Judgement],
    starts: tuple[Sequence[float], Sequence[float]],
    command: str,
    load: str,
) -> str:
    difference_ms = (statistics.median(starts[0]) - statistics.median(starts[1])) * 1000
    lines = [
        "# The preflight, and what looking at the hardware costs a start",
        "",
        "Question: how long does a preflight of eight healthy nodes take once its processes are up, whom does it name,",
        "and what does the survey of the hardware at each start cost?",
        "",
        f"- Hardware: {hardware()}; load average before and after: {load}",
        f"- Versions: {versions(['torch', 'railhead'])}",
        f"- Command: `{command}`; {len(healthy)} runs of each gang. Medians, and least to most.",
        "",
    ]
    if healthy:
        lines += [
            f"## Eight nodes as network namespaces, links of {RATE_MBIT} Mb/s",
            "",
            "| gang | connections, datagrams, transfers (s) | with all-reduces over gloo (s) | until the processes are up (s) | named |",
            "|---|---|---|---|---|",
            *(
                f"| {what} | {spread([one.network_s for one in checks])} | {spread([one.whole_s for one in checks])} "
                f"| {spread([one.start_s for one in checks])} | {_named(checks)} |"
                for what, checks in (("healthy", healthy), (f"host{SLOW_NODE} at half rate", slow))
            ),
            "",
            "All eight nodes share two cores here, also for importing torch eight times (the last column but one);",
            "nodes of their own do that side by side.",
            "",
        ]
    lines += [
        f"## Judgement over {NUM_SEEDS} drawn gangs of 4 to 33 nodes",
        "",
        "Each measurement has noise (4–5 %), and 3 % of them stumble to 30–90 %. benchmarks/preflight_model.py draws them.",
        "",
        "| measured | slow nodes found | healthy ones named |",
        "|---|---|---|",
        *(
            f"| {one.what} | {f'{one.num_found} of {NUM_SEEDS}' if 'healthy' not in one.what else '–'} | {one.num_accused} |"
            for one in judged
        ),
        "",
        "## The survey at each start",
        "",
        "Two ranks that do nothing (`--no-python true`), the whole command; with the survey, and with it switched off, taking turns.",
        "",
        "| start | whole command (s) |",
        "|---|---|",
        f"| as it is | {spread(starts[0], 3)} |",
        f"| without the survey | {spread(starts[1], 3)} |",
        "",
        f"Difference of the medians: {difference_ms:+.0f} ms. Ranks do not wait for the survey on a machine without GPUs; what remains is",
        "its share of the processor, and that the page is written before such a short job ends.",
        "",
    ]
    return "\n".join(lines)


def _named(checks: Sequence[Check]) -> str:
    kinds: dict[str, int] = {}
    for check in checks:
        for name in set(check.named):
            kinds[name] = kinds.get(name, 0) + 1
    return "; ".join(f"{name} ({count} of {len(checks)} runs)" for name, count in sorted(kinds.items())) or "nobody"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="2 runs, printed only")
    options = parser.parse_args()
    num_runs = 2 if options.quick else options.runs
    before = os.getloadavg()[0]
    reason = why_not()
    if reason is not None:
        print(f"no gang of namespaces: {reason}", file=sys.stderr)

    def checks(slow_node: int | None) -> list[Check]:
        return [] if reason is not None else [check_once(slow_node) for _ in range(num_runs)]

    healthy, slow = checks(None), checks(SLOW_NODE)
    with tempfile.TemporaryDirectory() as directory:
        starts = measure_starts(3 * num_runs, Path(directory))
    load = f"{before:.1f}, {os.getloadavg()[0]:.1f}"
    command = f"python -m benchmarks.preflight --runs {num_runs}"
    page = render(healthy, slow, judge_all(), starts, command, load)
    print(page)
    if not options.quick:
        RESULT.write_text(page)


if __name__ == "__main__":
    main()
