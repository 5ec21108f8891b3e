"""Jobs from Python: notebooks, sweeps, other tools.

    import launcher

    result = launcher.run("--nproc-per-node 2 train.py --lr 0.1")      # words of the command line, or a JobSpec; raises JobFailed

    with launcher.Job(["--nproc-per-node", "2", "train.py"]) as job:   # stopped when the block is left
        print(job.status.words)
        result = job.wait()

The launcher runs in a process of its own, not in the caller's: it handles signals, adopts orphans and forks, none of which a notebook's
kernel should have done to it. That process stops the job when the caller's dies, however.
"""

from __future__ import annotations

import codecs
import os
import pickle
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import IO, Any

from launcher import cli
from launcher.errors import EXIT_SIGNAL_BASE, JobFailed, LauncherError, SpecError
from launcher.options.carry import carried_environment
from launcher.options.intent import Intent, understand
from launcher.options.parse import parse
from launcher.report import find
from launcher.report.data import report_data
from launcher.report.failures import FailureFacts
from launcher.report.goodput import Goodput, goodput
from launcher.report.pace import Pace, pace
from launcher.report.record import RunRecord
from launcher.report.state import Stands, State, state_of
from launcher.spec import JobSpec

Order = JobSpec | str | Sequence[str]
"""A job: as a spec, or as what would stand behind `python -m launcher`, in one string or as words."""

_OUR_PATH = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_HOSTED = """
import signal, sys
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until somebody is there who understands it
sys.path.insert(0, sys.argv.pop(1))
from launcher.hosted import main
sys.exit(main())
"""
"""Not `-m launcher.hosted`: a notebook may have found this package by a path of its own, and ranks shall not inherit that."""


@dataclass(frozen=True)
class JobStatus:
    """Where a job stands."""

    state: str
    """A word of `report --json`: `waiting`, `starting`, `running`, `restarting`, `stopping`, `done`, `failed`, `lost`."""
    words: str
    run_dir: str | None
    num_restarts: int = 0
    progress: Pace | None = None
    """None: no step has been seen."""
    failure: FailureFacts | None = None
    """Of the newest attempt that failed."""

    @property
    def is_over(self) -> bool:
        return self.state in (Stands.DONE.value, Stands.FAILED.value, Stands.LOST.value)


@dataclass(frozen=True)
class JobResult:
    """How a job ended."""

    exit_code: int
    """The command's (docs/launcher.md): 0 if and only if every rank ended with 0."""
    reason: str
    run_dir: str | None
    num_attempts: int = 0
    total_s: float = 0.0
    failures: tuple[FailureFacts, ...] = ()
    """The root failure of each attempt that failed, in order."""
    goodput: Goodput | None = None

    @property
    def is_success(self) -> bool:
        return self.exit_code == 0

    @property
    def failure(self) -> FailureFacts | None:
        """Of the last attempt that failed; also of a job that then went well."""
        return self.failures[-1] if self.failures else None

    def check(self) -> JobResult:
        """Itself; raises JobFailed if it is no success."""
        if self.is_success:
            return self
        what = str(self.failure) if self.failure else self.reason
        where = self.failure.log if self.failure and self.failure.log else self.run_dir
        raise JobFailed(f"exit code {self.exit_code}: {what}", advice=f"see {where}" if where else "", result=self)


def run(order: Order, *, address: str | None = None, show: bool = True) -> JobResult:
    """Runs a job to its end. Raises what `Job` raises, and JobFailed if it does not end with 0. Interrupting it stops the job."""
    with Job(order, address=address, show=show) as job:
        return job.wait().check()


class Job:
    """A job, started when this is made. Methods may be called from any thread.

    order: what to run. address: the Ray cluster for a JobSpec (words have `--address`, and RAY_ADDRESS counts for them as on the
    command line); None: this machine. show: print what the command would print, where this process prints; the run directory has
    everything in any case.

    Raises SpecError for what the command would refuse at once. As a context it is stopped when the block is left.
    """

    def __init__(self, order: Order, *, address: str | None = None, show: bool = True) -> None:
        argv, intent = _understood(order, address)
        self._run_dir: str | None = None
        self._error: LauncherError | None = None
        self._result: JobResult | None = None
        self._lock = threading.Lock()
        self._told = threading.Event()
        self._over = threading.Event()
        order_fd, order_write_fd = os.pipe()
        news_fd, news_write_fd = os.pipe()
        is_ours = sys.stdout is sys.__stdout__ and sys.stderr is sys.__stderr__  # not in a notebook, nor under capture
        stream = (None if is_ours else subprocess.PIPE) if show else subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _HOSTED, _OUR_PATH, str(os.getpid()), str(order_fd), str(news_write_fd)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                pass_fds=(order_fd, news_write_fd),
                start_new_session=True,  # a terminal's Ctrl-C reaches it from us alone
            )
        except BaseException:
            os.close(order_write_fd)
            os.close(news_fd)
            raise
        finally:
            os.close(order_fd)
            os.close(news_write_fd)
        self._pumps = [
            threading.Thread(target=_pump, args=(pipe, out), name="output", daemon=True)
            for pipe, out in ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
            if pipe is not None
        ]
        for pump in self._pumps:
            pump.start()
        threading.Thread(target=self._follow, args=(news_fd,), name="job", daemon=True).start()
        _hand_over(order_write_fd, pickle.dumps((argv, intent)))

    @property
    def run_dir(self) -> str | None:
        """Where its journal and logs lie; None before it has begun, or if it never did."""
        return self._run_dir

    @property
    def pid(self) -> int:
        """Of its launcher."""
        return self._process.pid

    @property
    def status(self) -> JobStatus:
        """Where it stands now. Raises nothing."""
        run, is_over = self._record(), self._over.is_set()
        if is_over and self._result is not None and run is None:
            return JobStatus(Stands.FAILED.value, self._result.reason, None)
        if run is None:
            return JobStatus(Stands.STARTING.value, "starting", self._run_dir)
        state = self._state(run)
        speed = pace(run.attempt) if run.attempt is not None else None
        failures = _failures(run)
        return JobStatus(
            *(state.stands.value, state.words, self._run_dir, run.num_restarts, speed),
            failures[-1] if failures else None,
        )

    def report(self) -> dict[str, Any] | None:
        """What `python -m launcher report --json` prints; None before it has begun."""
        run = self._record()
        if run is None:
            return None
        until_s = None if self._over.is_set() else time.time() - run.began_wall_s
        return report_data(run, self._state(run), goodput(run, until_s))

    def wait(self, timeout_s: float | None = None) -> JobResult:
        """Until it ends. Raises TimeoutError (the job goes on), and what kept it from running: RequestRefused, ClusterUnavailable, ….

        KeyboardInterrupt stops the job as Ctrl-C stops the command, and is raised when all has ended; a second one kills at once.
        """
        try:
            if not self._over.wait(timeout_s):
                raise TimeoutError(f"the job has not ended after {timeout_s:g} s; it goes on")
        except KeyboardInterrupt:
            self._end(signal.SIGINT)
            raise
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def stop(self, signum: int = signal.SIGTERM) -> JobResult | None:
        """Ends it as the signal would end the command: ranks get it, and `--shutdown-timeout`. Returns when all has ended; the result is
        None if it never began. Does nothing to a job that is over."""
        self._end(signum)
        return self._result if self._error is None else None

    def __enter__(self) -> Job:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(signal.SIGTERM)

    def _end(self, signum: int) -> None:
        while not self._over.is_set():
            self._signal(signum)
            try:
                self._over.wait()
            except KeyboardInterrupt:  # whoever is impatient: the second signal kills at once
                continue

    def _signal(self, signum: int) -> None:
        with self._lock:
            if self._process.returncode is None:
                # Before its run directory is made it may not handle signals yet; then it has started nothing either.
                self._process.send_signal(signum)

    def _follow(self, news_fd: int) -> None:
        """In a thread: hears the news, then collects the process."""
        with os.fdopen(news_fd, "rb") as news:
            while len(head := news.read(8)) == 8:
                kind, value = pickle.loads(news.read(int.from_bytes(head, "little")))
                if kind == "run_dir":
                    self._run_dir = value
                else:
                    self._error = value
        os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            code = self._process.wait()
        for pump in self._pumps:
            pump.join()
        self._result = self._concluded(code if code >= 0 else EXIT_SIGNAL_BASE - code)
        self._over.set()

    def _concluded(self, exit_code: int) -> JobResult:
        run = self._record()
        if run is None:
            return JobResult(
                exit_code, str(self._error) if self._error else f"exit code {exit_code}, before it had begun", None
            )
        reason = run.ending.reason if run.ending else "its launcher ended without a word"
        good = goodput(run)
        return JobResult(exit_code, reason, self._run_dir, len(run.attempts), good.total_s, _failures(run), good)

    def _record(self) -> RunRecord | None:
        try:
            return find.read(self._run_dir).run if self._run_dir is not None else None
        except SpecError:
            return None

    def _state(self, run: RunRecord) -> State:
        return state_of(run, not self._over.is_set())


def _understood(order: Order, address: str | None) -> tuple[list[str], Intent]:
    """The command line that it stands for, and what it means. Raises SpecError."""
    if isinstance(order, JobSpec):
        cli.check_program(order.program)
        program = order.program
        return ["launcher.run", program.target, *program.args], Intent(_made_whole(order, address), None, address, ())
    if address is not None:
        raise SpecError("address is for a JobSpec", advice=f"write --address {address} among the words")
    words = shlex.split(order) if isinstance(order, str) else [str(word) for word in order]
    line = parse(words, os.environ)
    if line.wants_help or line.wants_version:
        raise SpecError("--help and --version run nothing", advice="name a script")
    intent = understand(line, os.environ, os.getcwd(), os.urandom(8).hex())
    cli.check_program(intent.spec.program)
    return ["launcher", *words], intent


def _made_whole(spec: JobSpec, address: str | None) -> JobSpec:
    """What the command line adds to a job: where it is, a name of its own, and on a cluster the variables that go along."""
    env = {**carried_environment(os.environ, ()), **spec.env} if address is not None else spec.env
    run_id = os.urandom(8).hex() if spec.run_id == JobSpec.run_id else spec.run_id
    return replace(spec, cwd=os.path.abspath(spec.cwd), env=env, run_id=run_id)


def _failures(run: RunRecord) -> tuple[FailureFacts, ...]:
    return tuple(attempt.failure for attempt in run.attempts if attempt.failure is not None)


def _hand_over(fd: int, data: bytes) -> None:
    try:
        with os.fdopen(fd, "wb") as pipe:
            pipe.write(data)
    except BrokenPipeError:
        pass  # it died at once, which `wait` tells


def _pump(pipe: IO[bytes], out: Any) -> None:
    """Output of the launcher to where this process prints, which need not be a file."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    with pipe:
        while data := pipe.read1(1 << 16):  # type: ignore[attr-defined]
            try:
                out.write(decoder.decode(data))
                out.flush()
            except (OSError, ValueError):  # closed meanwhile; the files have everything
                continue
