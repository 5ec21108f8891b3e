"""A process that has imported what ranks need, and from which they are forked. One for each agent.

Executed by path: `python -u forkserver.py CONTROL_FD AGENT_PID PADDING` in the job's directory, with the environment that all ranks
share, so that the interpreter and the libraries come up as they would in a rank. Standard library only and nothing of ours is
imported: what is in `sys.modules` here is in every rank's.

The first message says what to import. After each import this process must still be one that can be forked and whose children cannot tell:
no threads, no CUDA, no descriptors or children of a module's own, nothing read that differs from rank to rank, nothing printed. The first
module that breaks this is named, and the process ends; the agent starts a clean one without it (`forking.py`).

Then each message brings three or four descriptors: the control socket of a new guardian, its process's standard output and error, and
maybe one to keep. The guardian (`guardian.py`, forked twice so that the agent is its parent) reads its job from the socket and forks the
process, which leaves `serve` and continues at the end of this file.

A message may also ask for another server, and brings its control socket: a fork of this one, which then imports more.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
import time
import traceback
import types

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))
_MAX_MESSAGE = 1 << 20
PROCESS_NAME = b"railhead-forks"
_AT_START = frozenset(
    {"builtins", "sys", "os", "io", "abc", "codecs", "encodings", "site", "stat", "posixpath", "genericpath"}
)
"""What every interpreter has loaded before it looks for a program: a program's own module of such a name is never found anyhow."""
_ALL_THE_ENVIRONMENT = b"*"


def _sibling(name: str) -> Any:
    """A module of this directory that no import can find."""
    path = os.path.join(_HERE, f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"_railhead_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _WatchedEnvironment(dict[bytes, bytes]):
    """The data of `os.environ` while modules are imported: what is asked for is remembered."""

    asked: set[bytes]

    def __getitem__(self, name: bytes) -> bytes:
        self.asked.add(name)
        return super().__getitem__(name)

    def __contains__(self, name: object) -> bool:
        if isinstance(name, bytes):
            self.asked.add(name)
        return super().__contains__(name)

    def __iter__(self) -> Any:
        self.asked.add(_ALL_THE_ENVIRONMENT)
        return super().__iter__()


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


class Importer:
    """Imports modules one by one and looks after each whether this process is still fit to be forked."""

    def __init__(self, private_names: list[str]) -> None:
        """private_names: environment variables, or beginnings of them with a `*`, that differ from rank to rank."""
        self._private = [name.encode() for name in private_names]
        self._environment = _WatchedEnvironment(os.environ._data)  # type: ignore[attr-defined]
        self._environment.asked = set()
        self._fds = self._open_files()
        self._printed = self._size_of_output()

    def load(self, names: list[str], strict: set[str]) -> dict[str, str]:
        """Imports all; returns why those that failed did. Raises Unfit. `strict`: those of which nothing but safety is asked."""
        failed = {}
        plain = os.environ._data  # type: ignore[attr-defined]
        os.environ._data = self._environment  # type: ignore[attr-defined]
        try:
            for name in names:
                if name in sys.modules:
                    continue
                try:
                    importlib.import_module(name)
                except Exception as error:  # the rank's own import will say so, where the user can see it
                    failed[name] = f"{type(error).__name__}: {error}"
                reason = self._why_unfit(is_invited=name in strict)
                if reason:
                    raise Unfit(name, reason)
        finally:
            plain.clear()
            plain.update(dict(self._environment.items()))
            os.environ._data = plain  # type: ignore[attr-defined]
        return failed

    def _why_unfit(self, *, is_invited: bool) -> str:
        asked, self._environment.asked = self._environment.asked, set()
        if num_threads() > 1 and not _threads_end_at_a_fork():
            return "it leaves a thread running"
        opened = self._open_files() - self._fds
        if any(target.startswith(("/dev/nvidia", "/dev/kfd", "/dev/dri")) for _, target in opened):
            return "it touches a GPU"
        cuda = sys.modules.get("torch.cuda")
        if cuda is not None and cuda.is_initialized():
            return "it initialises CUDA"
        if opened:
            return f"it leaves a file open: {min(opened)[1]}"
        if _children():
            return "it leaves a process running"
        if is_invited:
            return ""
        private = sorted(name.decode() for name in asked if self._is_private(name))
        if private:
            return f"it reads {private[0]} from the environment"
        if self._size_of_output() != self._printed:
            return "it prints"
        return ""

    def _is_private(self, name: bytes) -> bool:
        return name == _ALL_THE_ENVIRONMENT or any(
            name.startswith(private[:-1]) if private.endswith(b"*") else name == private for private in self._private
        )

    @staticmethod
    def _open_files() -> set[tuple[str, str]]:
        found = set()
        for fd in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/self/fd/{fd}")
                if not target.startswith(f"/proc/{os.getpid()}/fd"):
                    found.add((fd, target))
        return found

    @staticmethod
    def _size_of_output() -> int:
        return sum(os.fstat(fd).st_size for fd in (1, 2))


class Unfit(Exception):
    """This process must not be forked from any more."""

    def __init__(self, module: str, reason: str) -> None:
        super().__init__(f"{module}: {reason}")
        self.module = module
        self.reason = reason


def _threads_end_at_a_fork() -> bool:
    """OpenBLAS starts its threads when it is loaded, ends them before each fork and starts them again at the first need: try."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    deadline = time.monotonic() + 0.2
    while num_threads() > 1 and time.monotonic() < deadline:
        time.sleep(0.002)
    return num_threads() == 1


def _children() -> str:
    with contextlib.suppress(OSError), open(f"/proc/self/task/{os.getpid()}/children") as file:
        return file.read()
    return ""


class Server:
    """Serves until the agent is gone. In a forked process `serve` is left by `Become`."""

    def __init__(self, control: socket.socket, agent_pid: int) -> None:
        self._control = control
        self._agent_pid = agent_pid
        self.guardian = _sibling("guardian")
        with open("/proc/self/comm", "rb") as file:
            self.process_name = file.read().strip()

    def prepare(self) -> bool:
        """Carries out the first message; False when this process is of no use."""
        words = self._control.recv(_MAX_MESSAGE)
        if not words:
            return False
        message = json.loads(words)
        self.guardian.prctl(self.guardian.PR_SET_NAME, PROCESS_NAME)  # the agent has us in its books
        began_s = time.monotonic()
        failed: dict[str, str] = {}
        names = list(message["first"])
        if message["modules_file"]:
            with open(message["modules_file"]) as file:
                names += [name for name in json.load(file) if name not in message["leave_out"]]
        try:
            failed = Importer(message["private"]).load(names, set(message["first"]))
        except Unfit as error:
            print(f"fork server: not fit to be forked from, {error}", file=sys.stderr)
            self._tell({"event": "unfit", "module": error.module, "reason": error.reason})
            return False
        # What lives now lives for good: the collector need not look at it, and so does not touch its pages, which ranks share.
        gc.collect()
        gc.freeze()
        took_s = time.monotonic() - began_s
        print(f"fork server: {len(sys.modules)} modules, {len(names)} asked for, {took_s:.2f} s", file=sys.stderr)
        for name, why in failed.items():
            print(f"fork server: {name} could not be imported: {why}", file=sys.stderr)
        self._tell({"event": "warm", "failed": failed, "num_modules": len(sys.modules)})
        return True

    def serve(self) -> None:
        while True:
            message, fds, _, _ = socket.recv_fds(self._control, 64, 4)
            if not message:
                return
            if message == b"server":
                self._fork_server(fds)
            else:
                self._fork(fds)

    def _tell(self, message: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            self._control.send(json.dumps(message).encode())

    def _in_child(self, fds: list[int]) -> bool:
        """Forks; here, waits for the child, which leaves at once what it was forked for (`_fall_to_agent`), and lets go of what is its."""
        pid = os.fork()
        if pid == 0:
            return True
        for fd in fds:
            os.close(fd)
        os.waitpid(pid, 0)
        return False

    def _fork(self, fds: list[int]) -> None:
        if not self._in_child(fds):
            return
        try:
            self._be_guardian(fds)
        except self.guardian.Become:
            raise
        except BaseException:
            os._exit(1)
        os._exit(0)

    def _fork_server(self, fds: list[int]) -> None:
        """In the child, the loop of `serve` goes on for the other socket, with more in memory."""
        if not self._in_child(fds):
            return
        try:
            self._fall_to_agent()
            self._control.close()
            self._control = socket.socket(fileno=fds[0])
            os.set_inheritable(fds[0], False)
            self.guardian.prctl(self.guardian.PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == self._agent_pid:
                self._tell({"event": "born", "pid": os.getpid()})
                if self.prepare():
                    return
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def _fall_to_agent(self) -> None:
        """Leaves a child of the agent's, in a session of its own, that is taken for a guardian until the agent knows its number."""
        between = os.getpid()
        self.guardian.prctl(self.guardian.PR_SET_NAME, self.guardian.PROCESS_NAME)
        if os.fork():
            os._exit(0)
        while os.getppid() == between:
            time.sleep(0.0002)
        os.setsid()

    def _be_guardian(self, fds: list[int]) -> None:
        self._fall_to_agent()
        for fd in self.guardian.open_fds():
            if fd > 2 and fd not in fds:
                os.close(fd)
        os.chdir("/")
        for fd in fds:
            os.set_inheritable(fd, False)
        guardian = self.guardian.Guardian(fds[0], self._agent_pid, fds[1:])
        guardian.choose = _choose
        guardian.run()


def _choose(job: dict[str, Any]) -> dict[str, Any]:
    """The job, or what executes a fresh interpreter if a fork would not do here."""
    reason = ""
    if job["kind"] == "store":
        reason = "" if "torch" in sys.modules else "torch could not be imported"
    elif job["own_modules"]:
        loaded = {name.partition(".")[0] for name in sys.modules} - _AT_START
        with contextlib.suppress(OSError):
            for entry in os.scandir(job["own_modules"]):
                name = entry.name.partition(".")[0]
                if name in loaded and _can_be_imported(entry):
                    reason = f"{entry.path} would be imported as {name}, which is in memory already"
    if not reason:
        return job
    with contextlib.suppress(OSError), open(job["note_file"], "a") as file:
        file.write(f"a fresh interpreter: {reason}\n")
    argv = job["argv_afresh"]
    for fd in job["keep_fds"]:  # the store's host gets its number by word
        os.set_inheritable(fd, True)
        argv = [str(fd) if word == "FD" else word for word in argv]
    return {**job, "argv": argv}


def _can_be_imported(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith((".py", ".so", ".pyc")) or os.path.isfile(os.path.join(entry.path, "__init__.py"))


def _become(job: dict[str, Any], born_with: dict[str, str], process_name: bytes, guardian: Any) -> None:
    """What a fresh interpreter would have of its own and a fork inherits. born_with: the environment before anything was imported."""
    env = dict(job["env"])
    for name, value in os.environ.items():  # what modules have set when they were imported
        if born_with.get(name) != value and env.get(name) == born_with.get(name):
            env[name] = value
    os.environ.clear()
    os.environ.update(env)
    if not sys.flags.safe_path:
        sys.path.insert(0, _HERE)  # the runner puts the program's own in its place
    guardian.prctl(guardian.PR_SET_NAME, process_name)
    with contextlib.suppress(Exception):
        _show_command(job["title"])
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()  # a fresh interpreter's is seeded by chance
    # `random` and `tempfile` see to themselves.
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.ORIGINAL_DIR = os.getcwd()  # type: ignore[attr-defined]
        process.current_process().authkey = os.urandom(32)
    logging = sys.modules.get("logging")
    if logging is not None:
        in_ns = isinstance(logging._startTime, int)
        logging._startTime = time.time_ns() if in_ns else time.time()  # type: ignore[attr-defined]


def _show_command(title: str) -> None:
    """`ps`, `pgrep -f train.py` and py-spy show the program's command line: it is written over ours, as setproctitle does it."""
    with open("/proc/self/stat", "rb") as file:
        fields = file.read().rpartition(b")")[2].split()
    begin, end = int(fields[45]), int(fields[46])
    shown = title.encode("utf-8", "surrogateescape")[: end - begin - 1]
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, shown, len(shown))


def _host_store(job: dict[str, Any]) -> None:
    store_type = importlib.import_module("torch.distributed").TCPStore
    store = store_type(
        job["host"], job["port"], is_master=True, wait_for_workers=False, master_listen_fd=job["keep_fds"][0]
    )
    while store:
        signal.pause()


def _main() -> tuple[dict[str, Any], types.ModuleType] | None:
    """Returns in a forked process, with its job; None when the server has done its service."""
    born_with = dict(os.environ)
    control_fd, agent_pid = int(sys.argv[1]), int(sys.argv[2])
    os.set_inheritable(control_fd, False)
    if not sys.flags.safe_path:
        del sys.path[0]  # this directory, in which a program must find nothing
    server = Server(socket.socket(fileno=control_fd), agent_pid)
    server.guardian.prctl(server.guardian.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent_pid:
        return None
    runner = _sibling("runner")
    runner.guard_streams()
    try:
        if server.prepare():
            server.serve()
            os._exit(0)  # what was imported has nothing to end
    except server.guardian.Become as become:
        job = become.job
    else:
        return None
    _become(job, born_with, server.process_name, server.guardian)
    return job, runner


if __name__ == "__main__":
    _found = _main()
    if _found is not None:
        _job, _runner = _found
        if _job["kind"] == "store":
            _host_store(_job)
        else:
            _runner.run(
                _job["kind"],
                _job["target"],
                _job["args"],
                _job["observer"],
                modules_file=_job["modules_file"],
                caller=__file__,
            )
