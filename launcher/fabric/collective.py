"""A process that takes part in all-reduces and measures GPUs: the only one of the preflight that imports torch.

`python -m launcher.fabric.collective` reads one JSON object a line on standard input and answers each with one on standard output. It says
first what it can do: `{"backend": "nccl" or "gloo", "gpus": n, "problem": ""}`. Then it is asked

    {"do": "store", "host": H}                          → {"port": P}: hosts a store there, on an ephemeral port
    {"do": "reduce", "host": H, "port": P, "rank": r, "world_size": n, "backend": B, "timeout_s": t, "device": d}
                                                        → {"seconds": s, "bytes": b}
    {"do": "compute", "device": d}                      → {"matmul": s, "copy": s}: of a GPU

What goes wrong is `{"problem": "…", "is_late": …}`: one sentence, never a traceback, and whether it only waited in vain for others; then
it ends, and who wants more starts another. It ends with its input, too. Which interfaces are used is decided by the
environment in which it was started, like that of a rank.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from launcher.fabric.jsonlines import questions

GLOO_BYTES = 2 << 20
"""Long enough that a link's rate shows and not its latency, short enough for a gigabit."""

NCCL_BYTES = 256 << 20
"""NCCL reaches its rate at some hundred megabytes."""

REPEATS = 2
"""After one that is not counted: connections are made in the first."""

MATMUL_SIZE = 8192
COPY_BYTES = 1 << 30
GPU_REPEATS = 5


class Rank:
    """One member of groups, each for one measurement."""

    def __init__(self, torch: Any, dist: Any) -> None:
        # Passed in as Any: most of torch is not typed, and tests hand in a stand-in.
        self._torch = torch
        self._dist = dist
        self._store: Any = None
        self.num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.backend = "nccl" if self.num_gpus and dist.is_nccl_available() else "gloo"

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request, one answer; whatever fails is a sentence."""
        try:
            match request["do"]:
                case "store":
                    return {"port": self._host(request["host"])}
                case "reduce":
                    return self._reduce(request)
                case "compute":
                    return gpu_seconds(self._torch, int(request["device"]))
            return {"problem": f"unknown request {request['do']!r}"}
        except Exception as error:  # torch's errors have no common base
            lines = str(error).strip().splitlines()
            problem = f"{type(error).__name__}: {lines[0] if lines else ''}"
            # Who only waited for the others is not the one to be named.
            is_late = any(
                word in problem.lower() for word in ("timeout", "timed out", "closed by peer", "reset by peer")
            )
            return {"problem": problem, "is_late": is_late}

    def _host(self, host: str) -> int:
        # Kept until the next one: its clients may still be leaving.
        self._store = self._dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        port: int = self._store.port
        return port

    def _reduce(self, request: dict[str, Any]) -> dict[str, Any]:
        torch, dist = self._torch, self._dist
        rank, world_size = int(request["rank"]), int(request["world_size"])
        timeout = timedelta(seconds=float(request["timeout_s"]))
        backend = str(request["backend"])
        device = f"cuda:{request['device']}" if backend == "nccl" else "cpu"
        if backend == "nccl":
            torch.cuda.set_device(device)
        store = dist.TCPStore(request["host"], int(request["port"]), is_master=False, timeout=timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        try:
            num_bytes = NCCL_BYTES if backend == "nccl" else GLOO_BYTES
            values = torch.ones(num_bytes // 4, device=device)
            seconds = []
            for _ in range(REPEATS + 1):
                values.fill_(1.0)
                dist.barrier()
                seconds.append(self._timed(lambda: dist.all_reduce(values), device))
            if not bool((values == world_size).all()):
                return {"problem": f"the sum is wrong: {values[0].item()} instead of {world_size}"}
            return {"seconds": min(seconds[1:]), "bytes": num_bytes}
        finally:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()

    def _timed(self, work: Callable[[], object], device: str) -> float:
        started = time.perf_counter()
        work()
        if device != "cpu":
            self._torch.cuda.synchronize()
        return time.perf_counter() - started


def gpu_seconds(torch: Any, device: int) -> dict[str, float]:
    """Seconds for a matrix product in bfloat16 and for a copy within the memory of a GPU: the best of several.

    `torch` is passed in, so that what is asked of it can be tested without a GPU.
    """
    where = f"cuda:{device}"
    matrix = torch.ones((MATMUL_SIZE, MATMUL_SIZE), dtype=torch.bfloat16, device=where)
    source = torch.ones(COPY_BYTES, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    found = {}
    tasks: tuple[tuple[str, Callable[[], object]], ...] = (
        ("matmul", lambda: matrix @ matrix),
        ("copy", lambda: target.copy_(source)),
    )
    for name, work in tasks:
        work()
        seconds = []
        for _ in range(GPU_REPEATS):
            torch.cuda.synchronize(where)
            started = time.perf_counter()
            work()
            torch.cuda.synchronize(where)
            seconds.append(time.perf_counter() - started)
        found[name] = min(seconds)
    return found


def main(argv: Sequence[str]) -> int:
    """Serves until its input ends."""
    # Whatever torch or NCCL print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        import torch
        import torch.distributed

        rank = Rank(torch, torch.distributed)
    except Exception as error:  # a broken installation: the rest of the preflight goes on
        say({"backend": "", "gpus": 0, "problem": f"torch cannot be imported ({type(error).__name__}: {error})"})
        return 1
    say({"backend": rank.backend, "gpus": rank.num_gpus, "problem": ""})
    for question in questions():
        answer = rank.answer(question)
        say(answer)
        if "problem" in answer:
            # A group that was not made leaves torch's count of groups behind, and names made of it would not meet those of others.
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
