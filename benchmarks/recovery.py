"""How long from the death of a rank until all ranks train again?

    python -m benchmarks.recovery                 # all ways, 5 rounds; writes benchmarks/results/
    python -m benchmarks.recovery --quick         # 1 round, prints only
    python -m benchmarks.recovery --no-ray        # without what needs a Ray cluster
    python -m benchmarks.recovery --only "railhead, 1 × 2" --rounds 500 --warm 1.5 --result benchmarks/results/NAME.md
    python -m benchmarks.recovery --only "railhead, 1 × 2" "torchrun fastest, 1 × 2" --warm 0.1 0.5 1 2   # soon after the first step

Every rank runs the same loop: a small model under DDP with gloo, an optimizer, one step after the other. When all ranks have
trained for a while, one, drawn by chance, is sent SIGKILL. `training again` is the time from that moment until the last rank, all of
them started anew, has made its first step. The ways take turns within each round. A trial that does not come back within the limit is
counted as not recovered. Whoever breaks it off (Ctrl-C) has the page of what was measured by then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.machine import hardware, versions

RESULT = Path(__file__).parent / "results" / "recovery_2cores_202611.md"
TRIAL_TIMEOUT_S = 30.0
RANKS_PER_NODE = 2

SCRIPT = """
import os, sys, time
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

directory = os.environ["BENCH_DIR"]
dist.init_process_group("gloo")
rank = dist.get_rank()
model = DistributedDataParallel(torch.nn.Linear(64, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
step = 0
while not os.path.exists(f"{directory}/stop"):
    optimizer.zero_grad()
    model(torch.ones(8, 64)).square().mean().backward()
    optimizer.step()
    if step == 0:
        # Not by TORCHELASTIC_RESTART_COUNT: torchrun counts a restart only on the node whose rank has failed.
        with open(f"{directory}/first.{rank}.tmp", "w") as file:
            file.write(f"{time.time()!r} {os.getpid()}")
        os.rename(f"{directory}/first.{rank}.tmp", f"{directory}/first.{rank}")
    step += 1
    time.sleep(0.01)
os._exit(0)
"""

RAY_SERVER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
cluster.add_node(num_cpus=4)
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass(frozen=True)
class Way:
    """One way to run the ranks."""

    name: str
    what: str
    commands: Callable[[], Sequence[Sequence[str]]]
    num_nodes: int
    env: Mapping[str, str] = field(default_factory=dict, hash=False)


def ways(address: str | None) -> list[Way]:
    """All that is compared."""
    python = sys.executable
    size = f"--nproc-per-node={RANKS_PER_NODE}"

    def ours(*options: str) -> Callable[[], Sequence[Sequence[str]]]:
        return lambda: [[python, "-m", "launcher", size, "--max-restarts=3", *options, "train.py"]]

    def torchrun(num_nodes: int, *options: str) -> Callable[[], Sequence[Sequence[str]]]:
        def commands() -> Sequence[Sequence[str]]:
            with socket.create_server(("127.0.0.1", 0)) as server:
                port = server.getsockname()[1]
            meet = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=bench"]
            one = [python, "-m", "torch.distributed.run", size, f"--nnodes={num_nodes}", "--max-restarts=3"]
            return [[*one, *meet, *options, "train.py"]] * num_nodes

        return commands

    fastest = ("--monitor-interval=0.01", "--shutdown-timeout=1", "--rdzv-conf=last_call_timeout=1")
    fast = f"the same with `{' '.join(fastest)}`"
    # By default the ranks of all attempts share the agents' store, where they find the ports of dead ranks and wait for them.
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    fresh_fast = f"{fast}, and `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`: rank 0 of each attempt hosts a fresh store"
    found = [
        Way("railhead, 1 × 2", "`python -m launcher --nproc-per-node 2 --max-restarts 3 train.py`", ours(), 1),
        Way("railhead spawn, 1 × 2", "the same with `--start-method spawn`", ours("--start-method=spawn"), 1),
        Way("torchrun, 1 × 2", "c10d rendezvous, `--max-restarts=3`, else its defaults", torchrun(1), 1),
        Way("torchrun fastest, 1 × 2", fresh_fast, torchrun(1, *fastest), 1, fresh),
        Way("torchrun, 2 × 2", "two agents on this machine", torchrun(2), 2),
        Way("torchrun fastest, 2 × 2", fresh_fast, torchrun(2, *fastest), 2, fresh),
    ]
    if address is not None:
        on_ray = ours("--nnodes=2", f"--address={address}", "--carry-env=BENCH_DIR")
        found.append(Way("railhead on Ray, 2 × 2", "`--nnodes 2 --address`, two raylets on this machine", on_ray, 2))
    return found


def try_once(way: Way, warm_s: float, chance: random.Random) -> float | None:
    """Seconds until all ranks trained again; None if they did not. Raises RuntimeError if they never trained at all."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "train.py").write_text(SCRIPT)
        env = {
            **os.environ,
            "BENCH_DIR": name,
            "RAILHEAD_RUNS": str(directory / "runs"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_AUTH_MODE": "disabled",
            **way.env,
        }
        with open(directory / "printed", "w") as printed:
            processes = [
                subprocess.Popen(argv, cwd=directory, env=env, stdout=printed, stderr=subprocess.STDOUT)
                for argv in way.commands()
            ]
        try:
            return _kill_one_and_wait(directory, way.num_nodes * RANKS_PER_NODE, warm_s, chance)
        finally:
            (directory / "stop").touch()
            for process in processes:
                process.terminate()
            for process in processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                process.wait()


def _kill_one_and_wait(directory: Path, num_ranks: int, warm_s: float, chance: random.Random) -> float | None:
    first = _wait_for_step(directory, num_ranks, 0.0)
    if first is None:
        raise RuntimeError(f"nobody trained: {(directory / 'printed').read_text()[-3000:]}")
    time.sleep(warm_s)
    killed_s = time.time()
    os.kill(chance.choice(first)[1], signal.SIGKILL)
    again = _wait_for_step(directory, num_ranks, killed_s)
    return None if again is None else max(at_s for at_s, _ in again) - killed_s


def _wait_for_step(directory: Path, num_ranks: int, after_s: float) -> list[tuple[float, int]] | None:
    """When each rank made its first step since `after_s`, and its process."""
    files = [directory / f"first.{rank}" for rank in range(num_ranks)]
    deadline = time.monotonic() + TRIAL_TIMEOUT_S
    while True:
        if all(file.exists() for file in files):
            words = [file.read_text().split() for file in files]
            steps = [(float(at_s), int(pid)) for at_s, pid in words]
            if all(at_s > after_s for at_s, _ in steps):
                return steps
        if time.monotonic() > deadline:
            return None
        time.sleep(0.005)


@contextlib.contextmanager
def ray_cluster() -> Iterator[str]:
    """Two raylets in a process of its own; their address."""
    env = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    server = subprocess.Popen(
        [sys.executable, "-c", RAY_SERVER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=env,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None
    with server.stdin, server.stdout:
        address = server.stdout.readline().strip()
        if not address:
            raise RuntimeError("the Ray cluster did not start")
        yield address
        server.stdin.close()
        server.wait(30)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    way: Way
    warm_s: float
    """How long all have trained when one of them is killed."""


@dataclass
class Trials:
    """What became of the trials of one case."""

    back_s: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """`round 7: did not come back`."""

    def row(self, case: Case) -> str:
        back = sorted(self.back_s)
        count = f"{len(back)} of {len(back) + len(self.failed)}"
        head = f"| {case.way.name} | {case.warm_s:g} | {count} |"
        return (
            f"{head} {statistics.median(back):.2f} | {back[0]:.2f} to {back[-1]:.2f} |" if back else f"{head} – | – |"
        )


def render(found: Mapping[Case, Trials], command: str, load: str, broken_off: str) -> str:
    """The report in Markdown. broken_off: after which round, if it was."""
    rows = [trials.row(case) for case, trials in found.items()]
    legend = "".join(f"- **{way.name}**: {way.what}\n" for way in dict.fromkeys(case.way for case in found))
    failed = [f"{case.way.name}, {case.warm_s:g} s: {text}" for case, trials in found.items() for text in trials.failed]
    failures = "".join(f"- {text}\n" for text in failed) or "None.\n"
    return (
        "# From the death of a rank until all train again\n\n"
        "Question: how long after SIGKILL of one rank has the last rank made its first step of the next attempt?\n\n"
        f"- Hardware: {hardware()}; load average before and after: {load}\n"
        f"- Versions: {versions(('torch', 'ray', 'railhead'))}\n"
        f"- Command: `{command}`; the rank is killed when all have trained for as long as the second column says, from the last rank's "
        "first step on; the ways take turns in each round. "
        f"Medians, and least to most, of the trials that came back within {TRIAL_TIMEOUT_S:g} s.\n"
        + (f"- Broken off {broken_off}.\n" if broken_off else "")
        + "\n| way | trained for (s) | recovered | training again (s) | spread (s) |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n{legend}\n## Trials that failed\n\n{failures}"
    )


def measure(case: Case, number: int, trials: Trials, chance: random.Random) -> None:
    """One trial, whatever becomes of it."""
    try:
        took_s = try_once(case.way, case.warm_s, chance)
    except RuntimeError as error:
        told = f"did not start: {error}"
    else:
        told = "did not come back" if took_s is None else f"{took_s:.2f} s"
    print(f"round {number}: {case.way.name}, {case.warm_s:g} s: {told}", flush=True)
    if told.startswith("did not"):
        trials.failed.append(f"round {number}: {told.splitlines()[0]}")
    else:
        assert took_s is not None
        trials.back_s.append(took_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--warm",
        type=float,
        nargs="+",
        default=[5.0],
        help="seconds of training before the kill; several: one case each",
    )
    parser.add_argument("--quick", action="store_true", help="one round; the result is printed, not written")
    parser.add_argument("--no-ray", action="store_true", help="leave out the ways that need a Ray cluster")
    parser.add_argument("--only", nargs="+", help="these ways, by their names")
    parser.add_argument("--seed", type=int, default=0, help="draws who is killed")
    parser.add_argument("--result", type=Path, default=RESULT)
    args = parser.parse_args()
    for signum in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # also where a shell has put us into the background, which ignores SIGINT
        signal.signal(signum, signal.default_int_handler)
    before, chance = os.getloadavg()[0], random.Random(args.seed)
    num_rounds = 1 if args.quick else args.rounds
    with contextlib.ExitStack() as stack:
        needs_ray = not args.no_ray and (args.only is None or any("Ray" in name for name in args.only))
        address = stack.enter_context(ray_cluster()) if needs_ray else None
        chosen = [way for way in ways(address) if args.only is None or way.name in args.only]
        if not chosen or (args.only is not None and len(chosen) < len(set(args.only))):
            parser.error(f"--only {args.only}: the ways are {', '.join(way.name for way in ways('ADDRESS'))}")
        cases = [Case(way, warm_s) for way in chosen for warm_s in args.warm]
        found = {case: Trials() for case in cases}
        broken_off = ""

        def page() -> str:
            command = shlex.join(["python", "-m", "benchmarks.recovery", *sys.argv[1:]])
            text = render(found, command, f"{before:.1f}, {os.getloadavg()[0]:.1f}", broken_off)
            if not args.quick:
                args.result.write_text(text)  # after each round: whoever ends us has what was measured
            return text

        try:
            for number in range(num_rounds):
                start = number % len(cases)
                for case in [*cases[start:], *cases[:start]]:
                    measure(case, number, found[case], chance)
                text = page()
        except KeyboardInterrupt:
            broken_off = f"in round {number} of {num_rounds}"
            text = page()
    print(text)


if __name__ == "__main__":
    main()
