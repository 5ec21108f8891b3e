"""The processes of one node that take part in the preflight's collectives: one for each GPU, or one without GPUs.

They import torch (collective.py); nothing else of the launcher does for the preflight's sake.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.fabric.jsonlines import JsonLines, Lost

COMMAND = (sys.executable, "-P", "-m", "launcher.fabric.collective")

MARGIN_S = 5.0
"""What a worker gets beyond the collective's own time-out, to say that it timed out."""

COMPUTE_S = 60.0
AGAIN_S = 30.0
"""For a worker that ended with a problem to be replaced; torch is in the page cache now."""
MAX_LOG_LINES = 20_000


@dataclass(frozen=True)
class Ready:
    """What the workers of a node can do."""

    backend: str = ""
    gpus: int = 0
    problem: str = ""
    """Why they cannot take part."""


@dataclass(frozen=True)
class Seat:
    """A node's place in one group."""

    host: str
    port: int
    """Where the group's store is."""
    position: int
    num_nodes: int
    ranks_per_node: int
    backend: str
    timeout_s: float


@dataclass(frozen=True)
class Reduced:
    """How a node fared in an all-reduce."""

    seconds: float = 0.0
    bytes: int = 0
    problem: str = ""
    is_late: bool = False
    """Its problem is only that it waited in vain for others."""


class Workers:
    """Not thread-safe but for what each method does itself; `close` ends all processes."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="railhead-preflight-", ignore_cleanup_errors=True)
        self._env = {**os.environ, **env}
        # NCCL says over what it is connected in its log alone. The user's own wish for another place would hide it from us.
        self._env.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT,NET,GRAPH,ENV", OMP_NUM_THREADS="1")
        self._env["NCCL_DEBUG_FILE"] = str(Path(self._folder.name) / "nccl.%p.log")
        self._processes = [JsonLines(COMMAND, self._env, is_quiet=True)]
        self._loading: set[int] = set()
        """Those that have not said yet that they are ready."""
        self._ready: Ready | None = None

    def ready(self, timeout_s: float) -> Ready:
        """Waits for the first to say what it finds, then starts one for each further GPU."""
        if self._ready is None:
            try:
                self._ready = Ready(**self._processes[0].read(timeout_s))
                more = [JsonLines(COMMAND, self._env, is_quiet=True) for _ in range(self._ready.gpus - 1)]
                self._processes += more
                for process in more:
                    process.read(timeout_s)
            except (Lost, TypeError) as error:
                self._ready = Ready(problem=str(error))
        return self._ready

    def store(self, host: str) -> int:
        answer = self._ask(0, {"do": "store", "host": host}, MARGIN_S)
        return int(answer.get("port", 0))

    def reduce(self, seat: Seat) -> Reduced:
        """All of the node's ranks at once; the slowest counts."""
        count = min(seat.ranks_per_node, len(self._processes))
        requests = [
            {
                "do": "reduce",
                "host": seat.host,
                "port": seat.port,
                "rank": seat.position * seat.ranks_per_node + idx,
                "world_size": seat.num_nodes * seat.ranks_per_node,
                "backend": seat.backend,
                "timeout_s": seat.timeout_s,
                "device": idx,
            }
            for idx in range(count)
        ]
        answers = self._ask_all(requests, seat.timeout_s + MARGIN_S)
        failed = sorted(
            (answer for answer in answers if answer.get("problem")), key=lambda answer: answer.get("is_late", True)
        )
        if failed:
            return Reduced(problem=failed[0]["problem"], is_late=failed[0].get("is_late", False))
        return Reduced(max(answer["seconds"] for answer in answers), answers[0]["bytes"])

    def gpu_compute(self) -> list[dict[str, float]]:
        num_gpus = self._ready.gpus if self._ready is not None else 0
        requests = [{"do": "compute", "device": idx} for idx in range(num_gpus)]
        # All at once: that is how training uses them, and what power and cooling must stand.
        return [{} if "problem" in answer else answer for answer in self._ask_all(requests, COMPUTE_S)]

    def nccl_log(self) -> list[str]:
        lines: list[str] = []
        for path in sorted(Path(self._folder.name).glob("nccl.*.log")):
            with contextlib.suppress(OSError):
                lines += path.read_text(errors="replace").splitlines()[: MAX_LOG_LINES - len(lines)]
        return lines

    def close(self) -> None:
        for process in self._processes:
            # They hold nothing that is worth an orderly end, and torch takes a second for one.
            process.kill()
            process.close()
        self._folder.cleanup()

    def _ask_all(self, requests: list[dict[str, Any]], timeout_s: float) -> list[dict[str, Any]]:
        if not requests:
            return []
        with ThreadPoolExecutor(max_workers=len(requests)) as pool:
            return list(pool.map(lambda item: self._ask(item[0], item[1], timeout_s), enumerate(requests)))

    def _ask(self, position: int, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            if position in self._loading:
                self._loading.discard(position)
                self._processes[position].read(AGAIN_S)
            answer: dict[str, Any] = self._processes[position].ask(request, timeout_s)
        except Lost as error:
            answer = {"problem": str(error), "is_late": False}
        if "problem" in answer:
            # It ends by itself. The next one loads torch while others are measured.
            self._processes[position].close()
            self._processes[position] = JsonLines(COMMAND, self._env, is_quiet=True)
            self._loading.add(position)
        return answer
