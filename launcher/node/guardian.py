"""Parent of one process: starts it, reports how it ended, and leaves nothing of it alive, however anyone dies.

Run by path with `python -I -S guardian.py FD AGENT_PID`, one for each rank, store host and cache daemon. Standard
library only and nothing of ours, so that it starts in some ten milliseconds and cannot be broken by what is installed.
How each death is handled:

- the agent dies (any signal): its pidfd becomes readable, and the control socket ends; the guardian kills the whole
  tree at once;
- the process ends: what it left behind is told to go, a second later it is killed. The guardian is a subreaper, so
  descendants that made sessions of their own or lost their parents are still its children: "no child left" is exactly
  "nothing left";
- the guardian dies: the kernel sends the process SIGKILL (PR_SET_PDEATHSIG), and its descendants fall to the agent,
  which is a subreaper too.

It speaks JSON lines on FD. In: the job, then `{"stop": grace_s, "signum": n}`. Out: `started` or `failed`, then `exited`, then `gone`.

The fork server (`forkserver.py`) has guardians too: forked ones, whose process is forked from them in turn instead of executing a
program. Only the last step differs: the child leaves through `Become`, and the fork server's own main program goes on as what the
job says.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import sys
import time

TYPE_CHECKING = False  # importing typing would cost a tenth of our start
if TYPE_CHECKING:
    from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_CHILD_SUBREAPER = 36
SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
"""Number of the system call, which glibc does not wrap, by machine."""
MPOL_PREFERRED = 1
"""Take memory from this node while it has some. MPOL_BIND would kill the rank when the node is full."""
MAX_MEMORY_NODES = 1024

LEFTOVER_GRACE_S = 1.0
"""Between SIGTERM and SIGKILL for what a process left behind. The promise is that nothing outlives its rank by more than 2 s."""
RESCAN_S = 0.02
"""While killing: how soon to look again for descendants that were born meanwhile."""


JANITORS = (b"multiprocessing.resource_tracker", b"torch_shm_manager")
"""Processes that remove shared memory when those who used it are gone: killed with the others, they would leave it behind."""
JANITOR_GRACE_S = 0.5
"""How long they are spared. They take milliseconds, and ignore SIGTERM themselves."""

HANDLED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

PROCESS_NAME = b"railhead-guard"
"""Children of that name are nobody's stray (`strays.py`): a guardian whose agent is dead ends by itself."""


class Become(BaseException):
    """Raised in the child of a forked guardian: unwinds to the main program, which then is the job's process."""

    def __init__(self, job: dict[str, Any]) -> None:
        super().__init__()
        self.job = job


def prctl(option: int, value: int | bytes) -> None:
    """Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    argument = value if isinstance(value, bytes) else ctypes.c_ulong(value)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def bind(cpus: list[int], memory_node: int | None) -> None:
    """Binds this process to CPUs and lets it prefer the memory of a node; both outlive exec and are inherited by its threads and children.

    Called in the child before it becomes the program (or, for a forked rank, before it starts threads). Raises OSError where the kernel
    refuses; whoever calls goes on without.
    """
    if cpus:
        os.sched_setaffinity(0, cpus)
    number = SET_MEMPOLICY.get(os.uname().machine)
    if memory_node is None or number is None:
        return
    bits = 8 * ctypes.sizeof(ctypes.c_ulong)
    mask = (ctypes.c_ulong * (MAX_MEMORY_NODES // bits))()
    mask[memory_node // bits] = 1 << (memory_node % bits)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(number, MPOL_PREFERRED, mask, ctypes.c_ulong(MAX_MEMORY_NODES)) != 0:
        raise OSError(ctypes.get_errno(), f"set_mempolicy: {os.strerror(ctypes.get_errno())}")


def parents() -> dict[int, int]:
    """Parent of every process on the machine that we can see."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as file:
                # The second field is the program's name in parentheses and may hold anything, also spaces and parentheses.
                found[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
    return found


def descendants_of(pid: int) -> list[int]:
    """Children, their children and so on, nearest first; zombies too."""
    children: dict[int, list[int]] = {}
    for child, parent in parents().items():
        children.setdefault(parent, []).append(child)
    found = list(children.get(pid, ()))
    for descendant in found:  # grows while it is walked
        found.extend(children.get(descendant, ()))
    return found


def is_janitor(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        command = file.read()
        return any(name in command for name in JANITORS)
    return False


def remove_shared_memory(pids: set[int], since_s: float) -> None:
    """Of dead processes: torch names its files after who made them, and its `file_system` way of sharing leaves them when that one is
    killed (seen with torch 2.13, although a torch_shm_manager was there)."""
    with contextlib.suppress(OSError):
        for entry in os.scandir("/dev/shm"):
            maker = entry.name.split("_")[1] if entry.name.startswith("torch_") and entry.name.count("_") == 3 else ""
            if maker.isdigit() and int(maker) in pids:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    if status.st_uid == os.getuid() and status.st_ctime >= since_s:
                        os.unlink(entry.path)


def signal_all(pids: list[int], signum: int) -> None:
    """Signals those that are still there and that we may signal."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signum)


class Guardian:
    """One process from its start to the last of its descendants."""

    def __init__(self, control_fd: int, agent_pid: int, fds: list[int] | None = None) -> None:
        """fds: where the process's descriptors are (standard output and error, and those to keep), if not where the job says."""
        self.control_fd = control_fd
        self.fds = fds
        self.choose: Any = None
        """In the child, the last word: turns the job into one that executes a program after all."""
        self.agent_pid = agent_pid
        self.pid = 0
        self.is_alive = False
        self.signals_sent: set[int] = set()
        self.kill_at: float | None = None  # monotonic; from then on everything is killed until nothing is left
        self.killing_since = 0.0
        self.began_s = time.time()
        self.known: set[int] = set()
        """All that this guardian has seen of its tree."""
        self.received = b""
        self.wake_fd, wake_write_fd = os.pipe()
        for fd in (self.wake_fd, wake_write_fd):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake_write_fd, warn_on_full_buffer=False)
        # A handler, not SIG_IGN: handlers are reset by exec, so the process that we start is born with the dispositions it would have had.
        for signum in HANDLED:
            if signal.getsignal(signum) is not signal.SIG_IGN or signum == signal.SIGCHLD:
                signal.signal(signum, lambda *_: None)

    def run(self) -> None:
        """Returns when nothing is left."""
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        prctl(PR_SET_NAME, PROCESS_NAME)
        poller = select.poll()
        poller.register(self.control_fd, select.POLLIN)
        poller.register(self.wake_fd, select.POLLIN)
        try:
            agent_fd = os.pidfd_open(self.agent_pid)
        except ProcessLookupError:
            return
        except OSError:  # a kernel before 5.3: the end of the control socket has to do
            agent_fd = -1
        if agent_fd >= 0:
            poller.register(agent_fd, select.POLLIN)
        if os.getppid() != self.agent_pid:
            return
        if self.fds is not None:
            self._tell({"event": "born", "pid": os.getpid()})
        job = self._first_message()
        if job is None:
            return
        if self.fds is not None:
            job["stdout_fd"], job["stderr_fd"], *job["keep_fds"] = self.fds
        self._start(job)
        # What has come together with the job is carried out now: no news would come of it any more.
        self._carry_out(b"")
        while not self._reap():
            ready = {fd for fd, _ in poller.poll(self._poll_timeout_ms())}
            if self.wake_fd in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self.wake_fd, 4096)
            if agent_fd in ready:
                poller.unregister(agent_fd)
                self.kill_at = 0.0
            if self.control_fd in ready and not self._obey():
                poller.unregister(self.control_fd)
                self.kill_at = 0.0
            if self.kill_at is not None and time.monotonic() >= self.kill_at:
                self._kill()
        remove_shared_memory(self.known, self.began_s)
        self._tell({"event": "gone"})

    def _kill(self) -> None:
        now = time.monotonic()
        self.killing_since = self.killing_since or now
        spares = now < self.killing_since + JANITOR_GRACE_S
        everyone = descendants_of(os.getpid())
        self.known.update(everyone)
        victims = [pid for pid in everyone if not (spares and is_janitor(pid))]
        signal_all(victims, signal.SIGKILL)

    def _poll_timeout_ms(self) -> int | None:
        if self.kill_at is None:
            return None
        return max(int((self.kill_at - time.monotonic()) * 1000) + 1, int(RESCAN_S * 1000))

    def _tell(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            try:
                data = data[os.write(self.control_fd, data) :]
            except OSError:  # the agent is gone; poll will say so too
                return

    def _first_message(self) -> dict[str, Any] | None:
        while b"\n" not in self.received:
            data = os.read(self.control_fd, 1 << 16)
            if not data:
                return None
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        job: dict[str, Any] = json.loads(line)
        return job

    def _obey(self) -> bool:
        """Carries out what has arrived; False when the agent is gone."""
        try:
            data = os.read(self.control_fd, 1 << 16)
        except OSError:
            return False
        self._carry_out(data)
        return bool(data)

    def _carry_out(self, data: bytes) -> None:
        *lines, self.received = (self.received + data).split(b"\n")
        for line in lines:
            message = json.loads(line)
            self._stop(float(message["stop"]), int(message["signum"]))

    def _stop(self, grace_s: float, signum: int) -> None:
        """Each signal goes to the process alone, and once: it may want to end its children itself (data loaders, a checkpoint writer)."""
        kill_at = time.monotonic() + grace_s
        if signum not in self.signals_sent and self.is_alive and grace_s > 0:
            self.signals_sent.add(signum)
            signal_all([self.pid], signum)
        self.kill_at = kill_at if self.kill_at is None else min(self.kill_at, kill_at)

    def _start(self, job: dict[str, Any]) -> None:
        """Forks and executes. The child's failure to execute comes back through a pipe that a successful exec closes."""
        error_fd, error_write_fd = os.pipe()
        guardian_pid = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _settle(job, guardian_pid)
                if self.choose is not None:
                    job = self.choose(job)
                if "argv" in job:
                    _execute(job)
                _restore_signals()
            except OSError as error:
                os.write(error_write_fd, f"{error.errno} {error.strerror}".encode())
                os._exit(127)
            except BaseException:
                os._exit(127)
            for fd in open_fds():
                if fd > 2 and fd not in job["keep_fds"]:
                    os.close(fd)
            raise Become(job)
        self.is_alive = True
        os.close(error_write_fd)
        for fd in {job["stdout_fd"], job["stderr_fd"], *job["keep_fds"]}:
            os.close(fd)  # or a listening port would outlive its owner
        reason = os.read(error_fd, 4096).decode()
        os.close(error_fd)
        if reason:
            number, _, text = reason.partition(" ")
            self._tell({"event": "failed", "errno": int(number), "error": text})
        else:
            self._tell({"event": "started", "pid": self.pid})

    def _reap(self) -> bool:
        """Collects the dead; True when there is nobody left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return True
            if pid == 0:
                return False
            self.known.add(pid)
            if pid == self.pid and self.is_alive:
                self.is_alive = False
                self._tell({"event": "exited", "status": status, "at_s": time.time()})
                self._end_leftovers()

    def _end_leftovers(self) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + LEFTOVER_GRACE_S
            signal_all([pid for pid in descendants_of(os.getpid()) if not is_janitor(pid)], signal.SIGTERM)
        else:
            self.kill_at = min(self.kill_at, time.monotonic() + LEFTOVER_GRACE_S)


def open_fds() -> list[int]:
    """Descriptors of this process."""
    return [fd for fd in map(int, os.listdir("/proc/self/fd")) if _is_open(fd)]


def _is_open(fd: int) -> bool:
    """The listing's own descriptor is closed by now."""
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def _settle(job: dict[str, Any], guardian_pid: int) -> None:
    """In the forked child: session, signals, streams, directory. Raises OSError."""
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != guardian_pid:  # the guardian died before the kernel knew of our wish
        os._exit(127)
    if job.get("bind"):
        with contextlib.suppress(
            OSError, ValueError, IndexError
        ):  # an unbound rank is slower; a job that does not start is worse
            bind(job["bind"]["cpus"], job["bind"]["memory_node"])
    signal.set_wakeup_fd(-1)
    os.dup2(job["stdout_fd"], 1)
    os.dup2(job["stderr_fd"], 2)
    for fd in {job["stdout_fd"], job["stderr_fd"]} - set(job["keep_fds"]):
        os.set_inheritable(fd, False)
    try:
        os.chdir(job["cwd"])
    except OSError as error:
        raise OSError(error.errno or errno.ENOENT, f"working directory {job['cwd']}: {error.strerror}") from None


def _restore_signals() -> None:
    """Signals as an interpreter has them when it has just started."""
    for signum in HANDLED:
        if callable(signal.getsignal(signum)):  # else it was ignored when we were started, and stays so
            signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


def _execute(job: dict[str, Any]) -> None:
    """Returns only by an OSError."""
    for signum in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores for itself
        signal.signal(signum, signal.SIG_DFL)
    try:
        os.execvpe(job["argv"][0], job["argv"], job["env"])
    except OSError as error:
        raise OSError(error.errno or errno.ENOEXEC, f"{job['argv'][0]}: {error.strerror}") from None


def main() -> None:
    control_fd, agent_pid = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(control_fd, False)
    Guardian(control_fd, agent_pid).run()


if __name__ == "__main__":
    main()
