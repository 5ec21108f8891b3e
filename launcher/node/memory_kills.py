"""Was it the kernel that killed a process, because memory ran out? A plain SIGKILL looks the same from outside; the kernel's own
books tell.

Two of them: the kernel's log, which names the process, where it may be read; and the counter of the memory cgroup in which the
node's processes are (`memory.events` of version 2, `memory.oom_control` of version 1). Reading is best effort; understanding is
pure.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence

_KILLED = re.compile(r"(Memory cgroup out of memory|Out of memory)[^\n]*?: Killed process (\d+) ")
_V1_UNLIMITED = 1 << 60


def killed_in_log(text: str, pid: int) -> str:
    """What the kernel's log says of the death of `pid`; empty if nothing.

    >>> killed_in_log("6,1,2,-;Memory cgroup out of memory: Killed process 71 (python) total-vm:9kB", 71)
    'its memory cgroup ran out of memory, and the kernel killed it'
    >>> killed_in_log("6,1,2,-;Out of memory: Killed process 71 (python) total-vm:9kB", 7)
    ''
    """
    for what, killed in reversed(_KILLED.findall(text)):
        if int(killed) == pid:
            where = "its memory cgroup" if "cgroup" in what else "the machine"
            return f"{where} ran out of memory, and the kernel killed it"
    return ""


def oom_kills(text: str) -> int | None:
    """The counter in `memory.events` or `memory.oom_control`.

    >>> oom_kills("low 0\\noom 4\\noom_kill 3\\n"), oom_kills("oom_kill_disable 0\\nunder_oom 0\\n")
    (3, None)
    """
    found = re.search(r"^oom_kill (\d+)$", text, re.MULTILINE)
    return int(found[1]) if found else None


def cgroup_directories(text: str) -> list[str]:
    """Where the memory cgroup of a process may be mounted, from its `/proc/PID/cgroup`.

    >>> cgroup_directories("4:memory:/job\\n0::/job")
    ['sys/fs/cgroup/memory/job', 'sys/fs/cgroup/memory', 'sys/fs/cgroup/job', 'sys/fs/cgroup']
    """
    found = []
    for line in text.splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        base = "sys/fs/cgroup/memory" if controllers == "memory" else "sys/fs/cgroup" if not controllers else ""
        # In a container the path may be the host's, while the cgroup itself is mounted at the top.
        found += [os.path.normpath(base + path), base] if base else []
    return list(dict.fromkeys(found))


class MemoryKills:
    """What the kernel's books say since the object was made. The counters are those of the cgroup of this process (its ranks are in it
    too), or of the whole machine where the cgroup has none.

    root: where `proc`, `sys` and `dev` are.
    """

    def __init__(self, root: str = "/") -> None:
        self._root = root
        self._counter = ""
        self._limit_bytes: int | None = None
        for directory in cgroup_directories(self._read("proc/self/cgroup")):
            for name, limit in (("memory.events", "memory.max"), ("memory.oom_control", "memory.limit_in_bytes")):
                if not self._counter and oom_kills(self._read(f"{directory}/{name}")) is not None:
                    self._counter = f"{directory}/{name}"
                    text = self._read(f"{directory}/{limit}").strip()
                    self._limit_bytes = int(text) if text.isdigit() and int(text) < _V1_UNLIMITED else None
        self._known = oom_kills(self._read(self._counter)) or 0
        self._known_on_machine = oom_kills(self._read("proc/vmstat"))

    def explain(self, pids: Sequence[int]) -> str:
        """Why the kernel killed one of these for memory; empty if nothing says that it did."""
        log = _read_kernel_log(os.path.join(self._root, "dev/kmsg"))
        told = next((words for pid in pids if (words := killed_in_log(log, pid))), "")
        if told:
            self._known += 1
            return f"{told}{self._limit()}"
        count = oom_kills(self._read(self._counter)) if self._counter else None
        if count is not None and count > self._known:
            self._known += 1
            return f"its memory cgroup ran out of memory, and the kernel killed a process in it{self._limit()}"
        on_machine = oom_kills(self._read("proc/vmstat"))
        if on_machine is not None and self._known_on_machine is not None and on_machine > self._known_on_machine:
            self._known_on_machine += 1
            return "the machine ran out of memory, and the kernel killed processes, probably this one"
        return ""

    def what_else(self) -> str:
        """Of a SIGKILL that is not explained."""
        if self._counter or self._known_on_machine is not None:
            return "sent by someone else: the kernel counts no kill for memory"
        return ""

    def _limit(self) -> str:
        return f" (limit {self._limit_bytes / 2**30:.3g} GiB)" if self._limit_bytes is not None else ""

    def _read(self, path: str) -> str:
        with contextlib.suppress(OSError, ValueError), open(os.path.join(self._root, path)) as file:
            return file.read(1 << 16)
        return ""


def _read_kernel_log(path: str) -> str:
    """All records that the kernel still holds; one read is one record."""
    records: list[bytes] = []
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while len(records) < 20_000:
                try:
                    records.append(os.read(fd, 8192))
                except BrokenPipeError:  # the record was overwritten while we came to it
                    continue
        finally:
            os.close(fd)
    return b"\n".join(records).decode("utf-8", "replace")
