"""How long from the command to the first all-reduce?

    python -m benchmarks.launch                 # all ways, 5 rounds; writes benchmarks/results/
    python -m benchmarks.launch --quick         # 1 round, prints only

Two ranks on this machine run the same script: join a gloo group, reduce one number, leave. `first all-reduce` is the time from the start of
the command to the moment at which rank 0 has the sum; `whole command` is until the command has ended. The ways take turns within
each round, so that a change of the machine's mood falls on all of them. The Ray cluster (one raylet) is started once, before.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import hardware, versions

RESULT = Path(__file__).parent / "results" / "launch_2cores_202611.md"
NUM_RANKS = 2
TRIAL_TIMEOUT_S = 180.0

SCRIPT = """
import os, time
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
total = torch.ones(1)
dist.all_reduce(total)
reduced_s = time.time()
assert total.item() == dist.get_world_size()
if dist.get_rank() == 0:
    with open(os.environ["BENCH_OUT"], "w") as file:
        file.write(repr(reduced_s))
dist.destroy_process_group()
"""

# The same work as a Ray Train user writes it: the loop is a function, the group is made by Ray Train.
RAY_TRAIN = """
import os, sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False, runtime_env={"env_vars": {"BENCH_OUT": os.environ["BENCH_OUT"]}})
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

def loop():
    import torch
    import torch.distributed as dist
    total = torch.ones(1)
    dist.all_reduce(total)
    reduced_s = time.time()
    assert total.item() == dist.get_world_size()
    if dist.get_rank() == 0:
        with open(os.environ["BENCH_OUT"], "w") as file:
            file.write(repr(reduced_s))

TorchTrainer(
    loop,
    scaling_config=ScalingConfig(num_workers=int(sys.argv[2])),
    torch_config=TorchConfig(backend="gloo"),
    run_config=RunConfig(storage_path=os.path.dirname(os.environ["BENCH_OUT"])),
).fit()
"""

RAY_SERVER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass(frozen=True)
class Way:
    """One way to start the ranks."""

    name: str
    what: str
    commands: Callable[[str], Sequence[tuple[Sequence[str], Mapping[str, str]]]]
    """For a script: the commands to start at once, each with what it adds to the environment."""
    needs_ray: bool = False


@dataclass(frozen=True)
class Trial:
    """One start."""

    to_all_reduce_s: float
    whole_s: float


def ways(address: str) -> tuple[Way, ...]:
    """All that is compared. The first is the one that ratios refer to."""
    python = sys.executable
    size = f"--nproc-per-node={NUM_RANKS}"

    def one(*argv: str) -> Callable[[str], Sequence[tuple[Sequence[str], Mapping[str, str]]]]:
        return lambda script: [([python, *(script if arg == "SCRIPT" else arg for arg in argv)], {})]

    return (
        Way("plain spawn", "two interpreters with the environment set by hand: what the work itself costs", _by_hand),
        Way("railhead", f"`python -m launcher {size} train.py`", one("-m", "launcher", size, "SCRIPT")),
        Way("torchrun", f"`torchrun {size} train.py`", one("-m", "torch.distributed.run", size, "SCRIPT")),
        Way(
            "torchrun --standalone",
            "the same with its flag",
            one("-m", "torch.distributed.run", "--standalone", size, "SCRIPT"),
        ),
        Way(
            "railhead on Ray",
            "`--address`, on the running cluster",
            one("-m", "launcher", "--address", address, "--carry-env=BENCH_OUT", size, "SCRIPT"),
            needs_ray=True,
        ),
        Way(
            "Ray Train",
            "TorchTrainer, on the running cluster",
            one("ray_train.py", address, str(NUM_RANKS)),
            needs_ray=True,
        ),
    )


def _by_hand(script: str) -> Sequence[tuple[Sequence[str], Mapping[str, str]]]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(NUM_RANKS),
        "OMP_NUM_THREADS": "1",
    }
    return [
        ([sys.executable, script], {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(NUM_RANKS)
    ]


def try_once(way: Way, directory: Path) -> Trial:
    """Raises RuntimeError, with the end of what was printed, if the way fails."""
    out = directory / "reduced"
    out.unlink(missing_ok=True)
    env = {**os.environ, "BENCH_OUT": str(out), "RAILHEAD_RUNS": str(directory / "runs"), **_quiet_ray()}
    commands = way.commands("train.py")
    began_s = time.time()
    with tempfile.TemporaryFile("w+") as printed:
        processes = [
            subprocess.Popen(argv, cwd=directory, env={**env, **extra}, stdout=printed, stderr=subprocess.STDOUT)
            for argv, extra in commands
        ]
        try:
            codes = [process.wait(TRIAL_TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        ended_s = time.time()
        if any(codes) or not out.exists():
            printed.seek(0)
            raise RuntimeError(f"{way.name} ended with {codes}: {printed.read()[-2000:]}")
    return Trial(float(out.read_text()) - began_s, ended_s - began_s)


def _quiet_ray() -> dict[str, str]:
    return {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


@contextlib.contextmanager
def ray_cluster() -> Iterator[str]:
    """One raylet in a process of its own; its address."""
    env = {**os.environ, **_quiet_ray()}
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


def _is_left_out(way: Way) -> bool:
    """Ray Train needs pandas (benchmarks/requirements.txt)."""
    if way.name == "Ray Train" and importlib.util.find_spec("pandas") is None:
        print("Ray Train is left out: pip install pandas")
        return True
    return False


def measure(chosen: Sequence[Way], num_rounds: int, directory: Path) -> dict[str, list[Trial]]:
    """All ways in turn, `num_rounds` times; a first round warms the page cache and does not count."""
    found: dict[str, list[Trial]] = {way.name: [] for way in chosen}
    for number in range(num_rounds + 1):
        # Rotated, so that nobody always follows the one whose processes still end.
        start = number % len(chosen)
        for way in [*chosen[start:], *chosen[:start]]:
            trial = try_once(way, directory)
            print(f"round {number}: {way.name}: {trial.to_all_reduce_s:.2f} s, whole {trial.whole_s:.2f} s", flush=True)
            if number > 0:
                found[way.name].append(trial)
    return found


def render(chosen: Sequence[Way], found: Mapping[str, list[Trial]], command: str, load: str) -> str:
    """The report in Markdown."""
    base = statistics.median(trial.to_all_reduce_s for trial in found[chosen[0].name])
    rows = []
    for way in chosen:
        first = sorted(trial.to_all_reduce_s for trial in found[way.name])
        whole = statistics.median(trial.whole_s for trial in found[way.name])
        middle = statistics.median(first)
        rows.append(
            f"| {way.name} | {middle:.2f} | {first[0]:.2f} to {first[-1]:.2f} | {middle / base:.2f} | {whole:.2f} |"
        )
    num_rounds = len(found[chosen[0].name])
    legend = "".join(f"- **{way.name}**: {way.what}\n" for way in chosen)
    return (
        "# From the command to the first all-reduce\n\n"
        f"Question: how long until {NUM_RANKS} ranks on one machine have reduced a number, and until the command has ended?\n\n"
        f"- Hardware: {hardware()}; load average before and after: {load}\n"
        f"- Versions: {versions(('torch', 'ray', 'railhead'))}\n"
        f"- Command: `{command}`; {num_rounds} rounds, the ways taking turns in each, "
        "after one to warm up. Medians, and least to most.\n\n"
        "| way | first all-reduce (s) | spread (s) | × plain spawn | whole command (s) |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\n{legend}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round; the result is printed, not written")
    parser.add_argument("--no-ray", action="store_true", help="leave out the ways that need a Ray cluster")
    args = parser.parse_args()
    num_rounds = 1 if args.quick else args.rounds
    before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        directory = Path(name)
        (directory / "train.py").write_text(SCRIPT)
        (directory / "ray_train.py").write_text(RAY_TRAIN)
        address = "" if args.no_ray else stack.enter_context(ray_cluster())
        chosen = [way for way in ways(address) if not (args.no_ray and way.needs_ray) and not _is_left_out(way)]
        found = measure(chosen, num_rounds, directory)
    command = "python -m benchmarks.launch " + " ".join(sys.argv[1:])
    text = render(chosen, found, command.strip(), f"{before:.1f}, {os.getloadavg()[0]:.1f}")
    print(text)
    if not args.quick:
        RESULT.write_text(text)
        print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
