"""Journals as a launcher would have written them, made by hand: each line says when (seconds since the job began)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.journal import Entry

WALL_S, MONO_S = 1_795_616_000.0, 5000.0


class Story:
    """Entries in order; `lines` is the file."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def tell(self, at_s: float, kind: str, **fields: Any) -> Story:
        self.entries.append(Entry(kind, WALL_S + at_s, MONO_S + at_s, fields))
        return self

    def begin(self, pid: int = 1, hostname: str = "elsewhere") -> Story:
        return self.tell(
            0.0,
            "JobBegan",
            run_dir="/runs/x",
            cluster="this machine",
            argv=["launcher", "train.py"],
            pid=pid,
            hostname=hostname,
        )

    def attempt(self, at_s: float, number: int, num_ranks: int = 2, started_after_s: float = 1.0) -> Story:
        nodes = [{"node_id": "n0", "hostname": "host-0", "addr": "10.0.0.1", "num_ranks": num_ranks}]
        self.tell(at_s, "OpenStore", attempt=number, node_id="n0")
        self.tell(at_s, "StartRanks", plan={"attempt": number, "world": {"nodes": nodes}})
        return self.tell(at_s + started_after_s, "RanksStarted", attempt=number, node_id="n0", pids=[1, 2])

    def steps(self, at_s: float, number: int, steps: int | None, **more: Any) -> Story:
        fields: dict[str, Any] = {"num_ranks": 2, "num_alive": 2, "waited_s": 0.0, "step_s": 1.0, "step_age_s": 0.0}
        return self.tell(at_s, "GangProgress", attempt=number, steps=steps, **{**fields, **more})

    def fail(self, at_s: float, number: int, message: str = "broken") -> Story:
        failure = {
            "attempt": number,
            "node_id": "n0",
            "rank": 1,
            "status": {"code": 1, "signum": None},
            "stderr_log": "/runs/x/attempt_0/rank_1/stderr.log",
            "exception": {
                "type_name": "ValueError",
                "message": message,
                "traceback": f"Traceback …\nValueError: {message}\n",
            },
        }
        self.tell(at_s, "ReportFailure", attempt=number, failure=failure, consequence="")
        return self.stop(at_s, number)

    def hang(self, at_s: float, number: int) -> Story:
        failure = {"attempt": number, "node_id": "n0", "rank": 0, "reason": "it stands in recv", "may_restart": True}
        self.tell(at_s, "ReportFailure", attempt=number, failure=failure, consequence="")
        return self.stop(at_s, number)

    def stop(self, at_s: float, number: int) -> Story:
        self.tell(at_s, "StopAttempt", attempt=number, node_id="n0", grace_s=30.0, signum=15)
        return self.tell(at_s + 0.5, "AttemptEnded", attempt=number, node_id="n0")

    def end(self, at_s: float, exit_code: int = 0, reason: str = "every rank ended with 0") -> Story:
        return self.tell(at_s, "JobEnded", exit_code=exit_code, reason=reason, num_attempts=1, duration_s=at_s)

    @property
    def lines(self) -> bytes:
        return b"".join(
            json.dumps({"v": 1, "wall_s": e.wall_s, "mono_s": e.mono_s, "kind": e.kind, **e.fields}).encode() + b"\n"
            for e in self.entries
        )

    def write(self, base: Path, run_id: str = "20261125-141615-d875") -> Path:
        directory = base / run_id
        directory.mkdir(parents=True)
        (directory / "journal.jsonl").write_bytes(self.lines)
        return directory
