"""How long from the loss of a node until the gang trains again?

    python -m benchmarks.node_loss                    # all, 3 rounds; writes benchmarks/results/
    python -m benchmarks.node_loss --rounds 1 --dry   # prints only
    python -m benchmarks.node_loss --only cut         # the cases with this word in their name

Nodes are network namespaces on this machine, each with a link of its own. Two nodes train (the script of `benchmarks.recovery`: a small
model under DDP with gloo, one rank per node); a third is held ready, or the gang may shrink. Then a node is killed with all that
runs on it, or its link is cut so that nobody is told, or its raylet alone is killed. `training again` is the time from that moment until
the last rank of the new gang has made its first step.

torchrun runs in namespaces of the same kind at its fastest settings, its rendezvous on a machine that is not lost (but where the
node of rank 0 is lost with the rendezvous on it). A trial that does not come back within the limit is counted as not recovered.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import namespaces
from benchmarks.machine import hardware, versions
from benchmarks.raynodes import RayNode, RayNodes, environment, ray_nodes
from benchmarks.recovery import SCRIPT
from launcher.node.guardian import descendants_of, parents

RESULT = Path(__file__).parent / "results" / "node_loss_2cores_202611.md"
TRIAL_TIMEOUT_S = 60.0
WARM_S = 3.0
SPARE_S = 8.0
"""torchrun's third agent has joined after that: it imports torch first."""
NUM_NODES = 3
STORE_PORT = 29400
FASTEST = (
    "--monitor-interval=0.01",
    "--shutdown-timeout=1",
    "--rdzv-conf=is_host={is_host},keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=1,join_timeout=60",
)
STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore(sys.argv[1], int(sys.argv[2]), is_master=True, wait_for_workers=False)
time.sleep(3600)
"""


@dataclass(frozen=True)
class Case:
    """What is lost, and who takes its place."""

    name: str
    fault: str
    """`kill`, `cut` or `raylet`."""
    rank: int
    """Whose node it is."""
    has_spare: bool

    @property
    def num_ranks_after(self) -> int:
        return 2 if self.has_spare else 1


CASES = (
    Case("node killed, spare there", "kill", 1, has_spare=True),
    Case("node killed, shrink", "kill", 1, has_spare=False),
    Case("node of rank 0 and of the store killed, spare there", "kill", 0, has_spare=True),
    Case("link cut, spare there", "cut", 1, has_spare=True),
    Case("link cut, shrink", "cut", 1, has_spare=False),
    Case("raylet killed alone, spare there", "raylet", 1, has_spare=True),
)


class Steps:
    """The files in which ranks say when they made their first step."""

    def __init__(self, directory: Path, is_over: Callable[[], bool]) -> None:
        """is_over: nobody is there any more who could start ranks."""
        self.directory = directory
        self._is_over = is_over

    def wait(self, num_ranks: int, after_s: float) -> dict[int, tuple[float, int]] | None:
        """By rank: when it made its first step since then, and its process; None if one did not in time, or the job has ended."""
        deadline_s = time.monotonic() + TRIAL_TIMEOUT_S
        while time.monotonic() < deadline_s and not self._is_over():
            found = {}
            for rank in range(num_ranks):
                with contextlib.suppress(FileNotFoundError):
                    at_s, pid = (self.directory / f"first.{rank}").read_text().split()
                    if float(at_s) > after_s:
                        found[rank] = (float(at_s), int(pid))
            if len(found) == num_ranks:
                return found
            time.sleep(0.005)
        return None

    def settle(self, num_ranks: int) -> dict[int, int] | None:
        """By rank: its process, once no rank was started anew for WARM_S; None if that was not so in time."""
        deadline_s = time.monotonic() + TRIAL_TIMEOUT_S
        while time.monotonic() < deadline_s and not self._is_over():
            found = self.wait(num_ranks, 0.0)
            if found is not None and time.time() - max(at_s for at_s, _ in found.values()) >= WARM_S:
                pids = {rank: pid for rank, (_, pid) in found.items()}
                if all(os.path.exists(f"/proc/{pid}") for pid in pids.values()):
                    return pids
            time.sleep(0.02)
        return None


@contextlib.contextmanager
def job_directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rhloss-") as name:
        (Path(name) / "train.py").write_text(SCRIPT)
        yield Path(name)


def ancestors_of(pid: int) -> list[int]:
    """The process and those above it."""
    above, found = parents(), [pid]
    while found[-1] in above and above[found[-1]] > 1:
        found.append(above[found[-1]])
    return found


def measure(steps: Steps, case: Case, strike: Callable[[int], None], printed: Path) -> float | None:
    """`strike` breaks the node on which this process runs."""
    first = steps.wait(2, 0.0)
    if first is None:
        raise RuntimeError(f"nobody trained: {printed.read_text()[-3000:]}")
    settled = steps.settle(2)
    if settled is None:
        return None  # it restarts by itself, again and again: there is nothing that a loss could be measured from
    struck_s = time.time()
    strike(settled[case.rank])
    again = steps.wait(case.num_ranks_after, struck_s + 0.001)
    return None if again is None else max(at_s for at_s, _ in again.values()) - struck_s


# --- ours -------------------------------------------------------------------------------------------------------------------------------


def try_ours(cluster: RayNodes, case: Case) -> float | None:
    """One job; afterwards the cluster has as many nodes as before."""
    for _ in range((3 if case.has_spare else 2) - len(cluster.running())):
        cluster.add(2)
    size = ("--nnodes=2", "--spare-nodes=1") if case.has_spare else ("--nnodes=1:2", "--max-restarts=3")
    broken: list[RayNode] = []

    def strike(pid: int) -> None:
        node = cluster.of_process(ancestors_of(pid))
        broken.append(node)
        match case.fault:
            case "kill":
                node.kill()
            case "cut":
                cluster.cut(node.idx)
            case _:
                os.kill(node.raylet, signal.SIGKILL)

    with job_directory() as directory, open(directory / "printed", "w") as printed:
        flags = (f"--address={cluster.address}", *size, "--carry-env=BENCH_DIR", "train.py")
        command = cluster.inside(0, sys.executable, "-m", "launcher", *flags)
        env = {**environment(), "BENCH_DIR": str(directory), "RAILHEAD_RUNS": str(directory / "runs")}
        with running([(command, env)], directory, printed.fileno()) as launchers:
            if case.has_spare:
                _wait_for_words(directory / "printed", "spare node")
            try:
                return measure(Steps(directory, lambda: have_ended(launchers)), case, strike, directory / "printed")
            finally:
                for node in broken:
                    node.kill()


def _wait_for_words(file: Path, words: str) -> None:
    deadline_s = time.monotonic() + TRIAL_TIMEOUT_S
    while words not in file.read_text():
        if time.monotonic() > deadline_s:
            raise RuntimeError(f"never said {words!r}: {file.read_text()[-3000:]}")
        time.sleep(0.02)


# --- torchrun ---------------------------------------------------------------------------------------------------------------------------


def try_torchrun(case: Case) -> float | None:
    """An agent on each of two or three nodes; the rendezvous on a node of its own, but where it shall be lost."""
    num_agents = 3 if case.has_spare else 2
    loses_store = case.rank == 0
    with namespaces.network(1 + NUM_NODES) as network, job_directory() as directory, contextlib.ExitStack() as stack:
        printed = stack.enter_context(open(directory / "printed", "w"))
        store_node = 1 if loses_store else 0
        endpoint = f"{network.address(store_node)}:{STORE_PORT}"
        env = {**environment(), "BENCH_DIR": str(directory), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        env["GLOO_SOCKET_IFNAME"] = "eth0"

        def inside(node: int, *command: str) -> list[str]:
            return ["ip", "netns", "exec", network.namespace(node), *command]

        def agent(node: int) -> list[str]:
            options = [option.format(is_host=int(node == store_node)) for option in FASTEST]
            size = "2" if case.has_spare else "1:2"
            return inside(
                node,
                *(sys.executable, "-m", "torch.distributed.run", f"--nnodes={size}", "--nproc-per-node=1"),
                *("--max-restarts=3", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=bench"),
                *(f"--local-addr={network.address(node)}", *options, "train.py"),
            )

        if not loses_store:
            server = inside(0, sys.executable, "-c", STORE, network.address(0), str(STORE_PORT))
            stack.enter_context(running([(server, env)], directory, printed.fileno()))
        commands = [(agent(node), env) for node in range(1, 1 + num_agents)]
        agents = list(stack.enter_context(running(commands[:2], directory, printed.fileno())))
        steps = Steps(directory, lambda: have_ended(agents))
        if case.has_spare and steps.wait(2, 0.0):
            agents += stack.enter_context(running(commands[2:], directory, printed.fileno()))
            time.sleep(SPARE_S)  # it waits in the rendezvous, and says nothing of it

        def strike(pid: int) -> None:
            above = ancestors_of(pid)
            idx = next(idx for idx, process in enumerate(agents) if process.pid in above)
            if case.fault == "cut":
                network.at_switch("ip", "link", "set", f"p{idx + 1}", "nomaster")
            else:
                kill_all(agents[idx])

        return measure(steps, case, strike, directory / "printed")


@contextlib.contextmanager
def running(
    commands: Sequence[tuple[Sequence[str], Mapping[str, str]]], directory: Path, printed: int
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The commands; ended with all that they have started."""
    processes = [
        subprocess.Popen(argv, cwd=directory, env=env, stdout=printed, stderr=printed) for argv, env in commands
    ]
    try:
        yield processes
    finally:
        (directory / "stop").touch()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(3)
            kill_all(process)


def have_ended(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    return all(process.poll() is not None for process in processes)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """The process and everything below it, at once."""
    pids = [process.pid, *descendants_of(process.pid)] if process.poll() is None else []
    for signum in (signal.SIGSTOP, signal.SIGKILL):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
    process.wait()


# --- the page ---------------------------------------------------------------------------------------------------------------------------

Found = dict[tuple[str, str], list[float | None]]


def render(found: Found, command: str, load: str) -> str:
    """The report in Markdown."""
    rows = []
    for (case, way), trials in found.items():
        back = sorted(trial for trial in trials if trial is not None)
        count = f"{len(back)} of {len(trials)}"
        told = f"{statistics.median(back):.2f} | {back[0]:.2f} to {back[-1]:.2f}" if back else "– | –"
        rows.append(f"| {case} | {way} | {count} | {told} |")
    fastest = " ".join(option.format(is_host=0) for option in FASTEST)
    return (
        "# From the loss of a node until the gang trains again\n\n"
        "Question: how long after the loss of one of two nodes has the last rank of the new gang made its first step?\n\n"
        f"- Hardware: {hardware()}; load average before and after: {load}\n"
        f"- Versions: {versions(('torch', 'ray', 'railhead'))}\n"
        f"- Command: `{command}`; one rank per node, nodes are network namespaces here, the loss comes {WARM_S:g} s after the last "
        f"rank's first step. Medians, and least to most, of the trials that came back within {TRIAL_TIMEOUT_S:g} s "
        "and before the job had ended.\n"
        "- railhead: `--nnodes 2 --spare-nodes 1`, or `--nnodes 1:2 --max-restarts 3`, on a Ray cluster whose head is not lost; "
        "`--heartbeat-timeout` is 4 s, its default.\n"
        f"- torchrun: `--nnodes 2` with a third agent waiting, or `--nnodes 1:2`; `{fastest}`, `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1`. "
        "There is no raylet. (With two missed keep-alives instead of three, living agents were taken for dead on a busy machine; "
        "one who then waits makes the others start again for ever.)\n\n"
        "| what is lost | | recovered | training again (s) | spread (s) |\n|---|---|---|---|---|\n"
        + "\n".join(rows)
        + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases with this word in their name")
    parser.add_argument("--no-torchrun", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print the result, do not write it")
    args = parser.parse_args()
    why_not = namespaces.why_not()
    if why_not is not None:
        print(f"not measured: {why_not}")
        return 1
    cases = [case for case in CASES if args.only in case.name]
    found: Found = {}
    before = os.getloadavg()[0]
    with ray_nodes(NUM_NODES) as cluster:
        ways: dict[str, Callable[[Case], float | None]] = {"railhead": lambda case: try_ours(cluster, case)}
        if not args.no_torchrun:
            ways["torchrun"] = try_torchrun
        trials = [(case, way) for case in cases for way in ways if not (case.fault == "raylet" and way == "torchrun")]
        for case, way in trials:
            found[case.name, way] = []
        for number in range(args.rounds):
            for case, way in random.Random(number).sample(trials, len(trials)):
                took_s = ways[way](case)
                told = "did not come back" if took_s is None else f"{took_s:.2f} s"
                print(f"round {number}: {case.name}: {way}: {told}", flush=True)
                found[case.name, way].append(took_s)
            command = shlex.join(["python", "-m", "benchmarks.node_loss", *sys.argv[1:]])
            text = render(found, command, f"{before:.1f}, {os.getloadavg()[0]:.1f}")
            if not args.dry:
                RESULT.write_text(text)  # after each round: whoever ends us has what was measured
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
