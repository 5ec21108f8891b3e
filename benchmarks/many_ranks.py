"""How long from the command until the last of 32 ranks has started?

    python -m benchmarks.many_ranks             # 5 rounds; writes benchmarks/results/
    python -m benchmarks.many_ranks --dry       # prints only

The ranks do nothing but write down when their first line ran. The ways take turns in each round, after one to warm up.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.machine import hardware, versions

RESULT = Path(__file__).parent / "results" / "many_ranks_2cores_202611.md"
TRIAL_TIMEOUT_S = 180.0
SCRIPT = """
import time
started_s = time.time()
import os
with open(f"{os.environ['BENCH_DIR']}/started.{os.environ['RANK']}", "w") as file:
    file.write(repr(started_s))
"""

Commands = list[tuple[Sequence[str], dict[str, str]]]


def by_hand(num_ranks: int) -> Commands:
    return [([sys.executable, "train.py"], {"RANK": str(rank)}) for rank in range(num_ranks)]


def railhead(num_ranks: int) -> Commands:
    return [([sys.executable, "-m", "launcher", f"--nproc-per-node={num_ranks}", "train.py"], {})]


def railhead_spawn(num_ranks: int) -> Commands:
    size = f"--nproc-per-node={num_ranks}"
    return [([sys.executable, "-m", "launcher", size, "--start-method=spawn", "train.py"], {})]


def torchrun(num_ranks: int) -> Commands:
    return [([sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}", "train.py"], {})]


WAYS: dict[str, Callable[[int], Commands]] = {
    "plain spawn": by_hand,
    "railhead": railhead,
    "railhead, --start-method spawn": railhead_spawn,
    "torchrun": torchrun,
}


def try_once(commands: Commands, num_ranks: int) -> float:
    """Seconds until the first line of the last rank. Raises RuntimeError if a command fails."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "train.py").write_text(SCRIPT)
        env = {**os.environ, "BENCH_DIR": name, "RAILHEAD_RUNS": str(directory / "runs")}
        began_s = time.time()
        with open(directory / "printed", "w") as printed:
            processes = [
                subprocess.Popen(argv, cwd=directory, env={**env, **more}, stdout=printed, stderr=printed)
                for argv, more in commands
            ]
        try:
            codes = [process.wait(TRIAL_TIMEOUT_S) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            raise RuntimeError(f"ended with {codes}: {(directory / 'printed').read_text()[-2000:]}")
        return max(float((directory / f"started.{rank}").read_text()) for rank in range(num_ranks)) - began_s


def render(found: dict[str, list[float]], num_ranks: int, command: str, load: str) -> str:
    """The report in Markdown."""
    rows = [
        f"| {way} | {statistics.median(times):.2f} | {min(times):.2f} to {max(times):.2f} |"
        for way, times in found.items()
    ]
    num_rounds = len(next(iter(found.values())))
    return (
        f"# {num_ranks} ranks that do nothing\n\n"
        "Question: how long from the command until the last rank runs its first line?\n\n"
        f"- Hardware: {hardware()}; load average before and after: {load}\n"
        f"- Versions: {versions(('torch', 'railhead'))}\n"
        f"- Command: `{command}`; {num_rounds} rounds, the ways taking turns in each, after one to warm up. Medians, and least to most.\n"
        "- Plain spawn: the interpreters started one after the other, and nothing else.\n\n"
        "| way | last rank started (s) | spread (s) |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--dry", action="store_true", help="print the result, do not write it")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):
        for way, make in WAYS.items():
            took_s = try_once(make(args.ranks), args.ranks)
            print(f"round {number}: {way}: {took_s:.2f} s", flush=True)
            if number:
                found[way].append(took_s)
    command = shlex.join(["python", "-m", "benchmarks.many_ranks", *sys.argv[1:]])
    text = render(found, args.ranks, command, f"{before:.1f}, {os.getloadavg()[0]:.1f}")
    print(text)
    if not args.dry:
        RESULT.write_text(text)
        print(f"written to {RESULT}")


if __name__ == "__main__":
    main()
