"""What does a job lose when everything around it breaks, again and again?

    python -m benchmarks.chaos --rounds 200                      # a result page in benchmarks/results/
    python -m benchmarks.chaos --rounds 12 --seed 7 --dry        # prints only
    python -m benchmarks.chaos --rounds 12 --seed 7 --kinds kill_rank,cut_link

A real Ray cluster of four small nodes in network namespaces; on it one job after the other, of two nodes with a spare, that may
shrink to one and grows again. In each round one thing, drawn from the seed, is broken: a rank, its guardian, the fork server, the
store, the agent, the actor above it, the raylet or the whole node is killed, agent or actor are frozen, the link is cut, the node is
drained. Then all ranks must train again. What is broken for good is replaced by a new node.

The script checks its own arithmetic and writes down every sample (`chaos_train.py`); after each job that is audited, and it is
looked for what was left behind: processes, files, sockets, resources held in Ray. The first finding ends the run, with a line that
repeats it and the directory of the job.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import chaos_audit, chaos_train, namespaces
from benchmarks.chaos_audit import Attempt
from benchmarks.machine import hardware, versions
from benchmarks.raynodes import RayNode, RayNodes, environment, ray_nodes

RESULT = Path(__file__).parent / "results" / "chaos_2cores_202611.md"
NUM_NODES = 4
ROUNDS_PER_JOB = 20
PATIENCE_S = 90.0
"""Only what is broken takes so long to train again."""
LEFT_PATIENCE_S = 40.0
"""Within this everything of a job must be gone: an actor that was frozen or cut off stays for half a minute to say why (agent_actor)."""
GIVEN_UP = "has not ended attempt"
"""What the launcher says of a node that it waits for in vain. Whatever is broken here is noticed sooner, by somebody else."""
STEPS_AGAIN = 3
"""So many steps on every rank are training."""
FLAGS = (
    "--nnodes=1:2",
    "--spare-nodes=1",
    "--grow-delay=1",
    "--max-restarts=100000",
    "--max-preemptions=100000",
    "--crash-loop=0",
    "--shutdown-timeout=5",
)


class Finding(Exception):
    """Something that must not be."""


@dataclass
class Place:
    """Where a rank of the running attempt is: its process, what stands above it, and its node."""

    rank: int
    pids: Sequence[int]
    port: int
    """Of the attempt's store."""
    node: RayNode

    def above(self, word: str) -> int:
        """The ancestor in whose command line the word stands."""
        return next(pid for pid in self.pids if word in command_of(pid))

    def below_agent(self, word: str) -> list[int]:
        """Processes of the node in whose command line the word stands."""
        return [pid for pid in self.node.pids() if word in command_of(pid)]


@dataclass(frozen=True)
class Fault:
    """One thing that can happen. `strike` returns what it broke for good, or None if it found nothing to break."""

    name: str
    strike: Callable[[Chaos, Place], RayNode | None]
    disturbs: bool = True
    """Whether a new attempt must follow."""


@dataclass
class Chaos:
    """One run of all rounds on one cluster."""

    cluster: RayNodes
    marks: Mapping[str, str]
    """In the environment of everything that runs: by it, what is left is found."""
    directory: Path
    chance: random.Random
    kinds: Sequence[Fault]
    job: Path = Path()
    process: subprocess.Popen[bytes] | None = None
    took_s: dict[str, list[float]] = field(default_factory=dict)
    num_attempts: int = 0
    num_steps: int = 0
    is_to_keep: bool = False
    """The directory is for a person to look at."""

    def keep(self) -> None:
        """Everything stays for a person to look at, what Ray has logged as well."""
        self.is_to_keep = True
        for logs in Path(self.cluster.directory).glob("session_2*/logs"):
            shutil.copytree(logs, self.directory / "ray_logs", symlinks=True, dirs_exist_ok=True)

    def run_job(self, number: int, num_rounds: int) -> None:
        """One job through so many rounds, its end, and its audit. Raises Finding."""
        self.job = self.directory / f"job{number}"
        (self.job / "log").mkdir(parents=True)
        with open(self.job / "stderr.txt", "w") as errors:
            script = os.path.abspath(chaos_train.__file__)
            command = [
                sys.executable,
                "-m",
                "launcher",
                f"--address={self.cluster.address}",
                *FLAGS,
                script,
                str(self.job),
            ]
            self.process = subprocess.Popen(
                self.cluster.inside(0, *command),
                cwd=self.job,
                env={**environment(), **self.marks},
                stdout=errors,
                stderr=errors,
            )
        try:
            self._wait_for_training(0, "the start")
            for idx in range(num_rounds):
                self._round(number * ROUNDS_PER_JOB + idx)
            (self.job / "enough").touch()
            self._wait(lambda: self._exit_code() is not None, "the job does not end")
            if self._exit_code() != 0:
                raise Finding(f"the job ended with {self._exit_code()}")
        finally:
            self.process.kill()
            self.process.wait()
        self._audit()

    def _round(self, number: int) -> None:
        places = self.places()
        fault, victim = self.chance.choice(self.kinds), self.chance.choice(places)
        before = self.attempts()[-1]
        began_s = time.monotonic()
        broken = fault.strike(self, victim)
        say(f"round {number}: {fault.name}: rank {victim.rank} of attempt {before.number}, node {victim.node.idx}")
        self._wait_for_training(before.number + 1 if fault.disturbs else before.number, fault.name)
        if GIVEN_UP in self.said():
            raise Finding(f"after {fault.name} a node that answers was given up, because it did not end its attempt")
        self.took_s.setdefault(fault.name, []).append(time.monotonic() - began_s)
        if broken is not None:
            broken.kill()
            self.cluster.add(2)

    # --- looking --------------------------------------------------------------------------------------------------------------------

    def attempts(self) -> list[Attempt]:
        return chaos_audit.read(self.job)

    def places(self) -> list[Place]:
        """Where the ranks of the last attempt are."""
        last = self.attempts()[-1]
        found = []
        for rank, lines in sorted(last.lines.items()):
            pids = lines[0]["pids"]
            found.append(Place(rank, pids, lines[0]["port"], self.cluster.of_process(pids)))
        return found

    def spare(self) -> RayNode | None:
        """A node that is not in use."""
        used = {place.node.idx for place in self.places()}
        return next((node for node in self.cluster.running() if node.idx not in used), None)

    def _wait_for_training(self, attempt: int, after: str) -> None:
        """Until all ranks of this attempt, or a later one, have made some steps from now on."""
        began = {found.number: found.num_done() for found in self.attempts()}

        def is_training() -> bool:
            if self._exit_code() is not None:
                raise Finding(f"after {after} the job ended with {self._exit_code()}")
            latest = self.attempts()
            if not latest or latest[-1].number < attempt:
                return False
            last = latest[-1]
            return last.num_done() >= began.get(last.number, 0) + STEPS_AGAIN

        self._wait(is_training, f"after {after} the ranks do not train again")

    def _wait(self, claim: Callable[[], bool], what: str, patience_s: float = PATIENCE_S) -> None:
        deadline_s = time.monotonic() + patience_s
        while not claim():
            if time.monotonic() > deadline_s:
                raise Finding(f"{what} within {patience_s:g} s")
            time.sleep(0.05)

    def said(self) -> str:
        """What the launcher has printed."""
        return (self.job / "stderr.txt").read_text()

    def _exit_code(self) -> int | None:
        assert self.process is not None
        return self.process.poll()

    # --- judging --------------------------------------------------------------------------------------------------------------------

    def _audit(self) -> None:
        attempts = self.attempts()
        faults = chaos_audit.faults_of(attempts)
        if faults:
            raise Finding("; ".join(faults[:5]))
        self._wait(
            lambda: not chaos_audit.processes_left(self.marks["RAILHEAD_CHAOS"]),
            "processes are left: nothing of a job may outlive it",
            LEFT_PATIENCE_S,
        )
        left = chaos_audit.files_left(self.directory / "tmp")
        if left:
            raise Finding(f"left in the directory for temporary files: {left[:5]}")
        deadline_s = time.monotonic() + LEFT_PATIENCE_S
        while held := chaos_audit.held_in_ray(self.cluster):
            if time.monotonic() > deadline_s:
                raise Finding(f"Ray still holds for the job: {held}")
            time.sleep(1.0)
        steps = max(attempt.steps_done() for attempt in attempts)
        self.num_attempts += len(attempts)
        self.num_steps += steps
        say(f"job of {len(attempts)} attempts and {steps} steps: every sample once, every state right, nothing left")


def command_of(pid: int) -> str:
    """Empty when the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def say(text: str) -> None:
    print(text, flush=True)


# --- what can happen --------------------------------------------------------------------------------------------------------------------


def _send(pid: int, signum: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def _kill_rank(chaos: Chaos, place: Place) -> None:
    _send(place.pids[0])


def _kill_guardian(chaos: Chaos, place: Place) -> None:
    _send(place.pids[1])


def _kill_fork_server(chaos: Chaos, place: Place) -> None:
    for pid in place.below_agent("forkserver.py"):
        if pid not in place.pids and _parent_of(pid) == place.above("launcher.node.agent_host"):
            _send(pid)


def _kill_store(chaos: Chaos, place: Place) -> None:
    """Its host is below the agent of rank 0, and listens at MASTER_PORT."""
    first = chaos.places()[0]
    for pid in first.node.pids():
        if pid != first.pids[0] and _listens_at(pid, first.port) and "agent_host" not in command_of(pid):
            _send(pid)


def _kill_agent(chaos: Chaos, place: Place) -> None:
    _send(place.above("launcher.node.agent_host"))


def _kill_actor(chaos: Chaos, place: Place) -> None:
    _send(place.above("ray::AgentActor"))


def _kill_raylet(chaos: Chaos, place: Place) -> RayNode:
    _send(place.node.raylet)
    return place.node


def _kill_node(chaos: Chaos, place: Place) -> RayNode:
    place.node.kill()
    return place.node


def _kill_node_of_rank_0(chaos: Chaos, place: Place) -> RayNode:
    return _kill_node(chaos, chaos.places()[0])


def _kill_spare(chaos: Chaos, place: Place) -> RayNode | None:
    spare = chaos.spare()
    if spare is not None:
        spare.kill()
    return spare


def _freeze_rank(chaos: Chaos, place: Place) -> None:
    """The others wait in their collective; the launcher names it after 10 s and starts again."""
    _send(place.pids[0], signal.SIGSTOP)


def _freeze_agent(chaos: Chaos, place: Place) -> None:
    _send(place.above("launcher.node.agent_host"), signal.SIGSTOP)


def _freeze_actor(chaos: Chaos, place: Place) -> None:
    _send(place.above("ray::AgentActor"), signal.SIGSTOP)


def _cut_link(chaos: Chaos, place: Place) -> RayNode:
    chaos.cluster.cut(place.node.idx)
    return place.node


def _drain(chaos: Chaos, place: Place) -> RayNode:
    command = chaos.cluster.inside(0, sys.executable, "-c", _DRAIN, place.node.node_id, chaos.cluster.address)
    subprocess.run(command, env=environment(), check=True, timeout=PATIENCE_S)
    return place.node


_DRAIN = """
import sys, time
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
node_id, address = sys.argv[1:]
reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
accepted, why = GcsClient(address=address).drain_node(node_id, reason, "spot notice", int((time.time() + 60) * 1000))
assert accepted, why
"""


def _ask_agent_to_leave(chaos: Chaos, place: Place) -> RayNode:
    _send(place.above("launcher.node.agent_host"), signal.SIGTERM)
    return place.node


FAULTS = (
    Fault("kill_rank", _kill_rank),
    Fault("kill_guardian", _kill_guardian),
    Fault("kill_fork_server", _kill_fork_server, disturbs=False),
    Fault("kill_store", _kill_store),
    Fault("kill_agent", _kill_agent),
    Fault("kill_actor", _kill_actor),
    Fault("kill_raylet", _kill_raylet),
    Fault("kill_node", _kill_node),
    Fault("kill_node_of_rank_0", _kill_node_of_rank_0),
    Fault("kill_spare", _kill_spare, disturbs=False),
    Fault("freeze_rank", _freeze_rank),
    Fault("freeze_agent", _freeze_agent),
    Fault("freeze_actor", _freeze_actor),
    Fault("cut_link", _cut_link),
    Fault("drain", _drain),
    Fault("sigterm_agent", _ask_agent_to_leave),
)


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _listens_at(pid: int, port: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        inodes = {
            line.split()[9] for line in lines if line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A"
        }
        return any(os.readlink(fd)[8:-1] in inodes for fd in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False


# --- the run ----------------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def chaos_on_a_cluster(seed: int, kinds: Sequence[Fault]) -> Iterator[Chaos]:
    """A cluster and a directory for it."""
    token = f"chaos-{os.getpid()}-{seed}"
    directory = Path(tempfile.mkdtemp(prefix=f"rhchaos-{seed}-", dir="/tmp"))
    (directory / "tmp").mkdir()
    marks = {"RAILHEAD_CHAOS": token, "TMPDIR": str(directory / "tmp")}
    with ray_nodes(NUM_NODES, env=marks) as cluster:
        chaos = Chaos(cluster, marks, directory, random.Random(seed), kinds)
        yield chaos
    if not chaos.is_to_keep:
        shutil.rmtree(directory)


def run(chaos: Chaos, num_rounds: int) -> None:
    """All rounds. Raises Finding."""
    for number, first in enumerate(range(0, num_rounds, ROUNDS_PER_JOB)):
        chaos.run_job(number, min(ROUNDS_PER_JOB, num_rounds - first))


def choose(names: str | None) -> list[Fault]:
    """The faults of these names; None: all that can happen here. Raises ValueError."""
    known = {fault.name: fault for fault in FAULTS}
    if names is None:
        return [fault for fault in FAULTS if fault.name != "cut_link" or namespaces.why_not() is None]
    unknown = [name for name in names.split(",") if name not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: the kinds are {', '.join(known)}")
    return [known[name] for name in names.split(",")]


def render(chaos: Chaos, command: str, num_rounds: int, load: str, minutes: float) -> str:
    """The report in Markdown."""
    rows = [
        f"| {name} | {len(times)} | {statistics.median(times):.1f} | {max(times):.1f} |"
        for name, times in sorted(chaos.took_s.items())
    ]
    return (
        "# A job around which everything breaks\n\n"
        "Question: is a job lost, does one go on from a wrong state, is a sample lost or used twice, is anything left behind?\n\n"
        f"- Hardware: {hardware()}; load average before and after: {load}\n"
        f"- Versions: {versions(('torch', 'ray', 'railhead'))}\n"
        f"- Command: `{command}`; {num_rounds} rounds in {minutes:.0f} minutes, {ROUNDS_PER_JOB} for each job\n\n"
        f"**Nothing**: {num_rounds} rounds, {chaos.num_attempts} attempts, {chaos.num_steps} steps; every state and every sample "
        "as computed beforehand, every job ended with 0, no process, file, socket or resource of Ray was left after a job.\n\n"
        f"Seconds from the fault until every rank had made {STEPS_AGAIN} steps again (of 0.02 s each; looked at every 0.05 s):\n\n"
        "| what was broken | times | median | longest |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, help="drawn if not given, and printed")
    parser.add_argument("--kinds", help="names of faults, with commas; all if not given")
    parser.add_argument("--dry", action="store_true", help="print the result, do not write it")
    args = parser.parse_args()
    try:
        kinds = choose(args.kinds)
    except ValueError as error:
        parser.error(str(error))
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    words = [f"--rounds {args.rounds}", f"--seed {seed}", *([f"--kinds {args.kinds}"] if args.kinds else [])]
    command = f"python -m benchmarks.chaos {' '.join(words)}"
    say(f"to repeat: {command}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the cluster is ended
    before, began_s = os.getloadavg()[0], time.monotonic()
    with chaos_on_a_cluster(seed, kinds) as chaos:
        try:
            run(chaos, args.rounds)
        except Finding as finding:
            say(f"FOUND: {finding}\n  in {chaos.job}; to repeat: {command}\n\n{chaos.said()[-4000:]}")
            chaos.keep()
            return 1
    load = f"{before:.1f}, {os.getloadavg()[0]:.1f}"
    text = render(chaos, command, args.rounds, load, (time.monotonic() - began_s) / 60)
    say(text)
    if not args.dry:
        RESULT.write_text(text)
        say(f"written to {RESULT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
