"""A process and its guardian: what the guardian is told is done, whenever it is told."""

from __future__ import annotations

import os
import select
import signal
import sys
from pathlib import Path

import pytest

from launcher.node import guarded
from launcher.node.guarded import Exited, Gone, Report

PATIENCE_S = 60.0


@pytest.mark.parametrize("grace_s", [0.0, 30.0])
def test_a_stop_that_is_sent_with_the_job_is_carried_out(tmp_path: Path, grace_s: float) -> None:
    """On a busy machine a guardian is born late, and finds the order to stop beside its job. It must not wait for more to be said: the
    rank would train on while its attempt is over everywhere else."""
    with (tmp_path / "out").open("w") as out:
        process = guarded.execute(
            [sys.executable, "-c", "import time; time.sleep(600)"], os.environ, ".", out.fileno(), out.fileno()
        )
        process.stop(grace_s)
        reports: list[Report] = []
        while not any(isinstance(report, Gone) for report in reports):
            assert select.select([process.socket], [], [], PATIENCE_S)[0], f"it runs on: {reports}"
            reports += process.read()
        process.close()
    (exited,) = [report for report in reports if isinstance(report, Exited)]
    assert exited.status.signum == (signal.SIGTERM if grace_s else signal.SIGKILL)
