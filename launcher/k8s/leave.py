"""What a Ray pod does when it is told to go, before its processes are signalled: `python -m launcher.k8s.leave head | worker --seconds 50`.

It is the preStop hook of the Ray containers, and runs as long as there is something to wait for. SIGTERM alone would end Ray at once, and
the ranks with it, whatever grace the pod has. A worker that leaves alone (a spot node is taken back, a node is drained) tells Ray, from
which the launcher hears it: ranks save, and training goes on elsewhere. A head that leaves takes the job with it, so it stops the job
first, as KubeRay does when the job is deleted: the launcher gets SIGTERM, once, and hands it on to the ranks.

Standard library only: a hook must not take seconds to start. What it says goes to the container's log.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

AGENT = "ray::AgentActor"
"""How Ray titles the process of the launcher's agent; while there is one, the node has a part in a gang."""
_RAYLET_NODE_ID = "--node_id="
_POLL_S = 0.25
_TIMEOUT_S = 5.0
_MAX_SILENT = 8
"""A dashboard that does not answer so often in a row has ended already."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launcher.k8s.leave")
    parser.add_argument("role", choices=("head", "worker"))
    parser.add_argument("--seconds", type=float, required=True, help="How long to stay at most.")
    parser.add_argument("--dashboard", default="http://127.0.0.1:8265")
    parser.add_argument("--node", default=None, help="Id of this node. [the raylet's that runs here]")
    parser.add_argument("--proc", type=Path, default=Path("/proc"))
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    if args.role == "head":
        _leave_as_head(args.dashboard, deadline)
    else:
        _leave_as_worker(args.proc, args.node, deadline)
    return 0


def _leave_as_head(dashboard: str, deadline: float) -> None:
    running = _running_jobs(dashboard)
    for job in running or ():
        _say(f"this head is told to go: stopping job {job}")
        _request(f"{dashboard}/api/jobs/{job}/stop", "POST")
    num_silent = 0

    def has_ended() -> bool:
        nonlocal num_silent
        found = _running_jobs(dashboard)
        num_silent = num_silent + 1 if found is None else 0
        return found == [] or num_silent >= _MAX_SILENT

    _wait(has_ended, deadline)


def _leave_as_worker(proc: Path, node: str | None, deadline: float) -> None:
    if not _has_agent(proc):
        return
    seconds = int(deadline - time.monotonic())
    node = node or next(_node_ids(proc), None)
    _say(f"this pod is told to go: ranks have {seconds} s to save what they have")
    words = [
        "ray",
        "drain-node",
        "--reason",
        "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message",
        "the pod is told to go",
    ]
    words += ["--deadline-remaining-seconds", str(seconds), *(["--node-id", node] if node else [])]
    try:
        # Beside the wait: a head that is gone as well would hold it up.
        told = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        _say(f"cannot tell Ray: {error}")
        return
    is_told = False

    def has_ended() -> bool:
        nonlocal is_told
        if not is_told and told.poll() is not None:
            is_told = True
            if told.returncode:
                _say(f"Ray was not told: {told.stderr.read().strip()[-300:] if told.stderr else told.returncode}")
        return not _has_agent(proc)

    with told:
        _wait(has_ended, deadline)
        told.kill()


def _wait(has_ended: Callable[[], bool], deadline: float) -> None:
    while not has_ended() and time.monotonic() < deadline:
        time.sleep(_POLL_S)


def _running_jobs(dashboard: str) -> list[str] | None:
    """Submission ids; None if nobody answers."""
    jobs = _request(f"{dashboard}/api/jobs/", "GET")
    if jobs is None:
        return None
    return [
        one["submission_id"] for one in jobs if one.get("submission_id") and one["status"] in ("PENDING", "RUNNING")
    ]


def _request(url: str, method: str) -> Any:
    token = os.environ.get("RAY_AUTH_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, method=method, headers=headers), timeout=_TIMEOUT_S
        ) as answer:
            return json.loads(answer.read() or b"null")
    except (urllib.error.URLError, OSError, ValueError):
        return None


def _has_agent(proc: Path) -> bool:
    return any(words[0].startswith(AGENT) for words in _commands(proc))


def _node_ids(proc: Path) -> Iterator[str]:
    for words in _commands(proc):
        if Path(words[0]).name == "raylet":
            yield from (word.removeprefix(_RAYLET_NODE_ID) for word in words if word.startswith(_RAYLET_NODE_ID))


def _commands(proc: Path) -> Iterator[list[str]]:
    """Command lines of this pod's processes (those that this user may see)."""
    for name in os.listdir(proc):
        if not name.isdigit():
            continue
        try:
            words = Path(proc, name, "cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
        except OSError:
            continue
        if words[0]:
            yield words


def _say(text: str) -> None:
    """A hook's own output is thrown away; what process 1 writes is the container's log."""
    line = f"launcher: {text}\n"
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        try:
            with open("/proc/1/fd/2", "w") as log:
                log.write(line)
            return
        except OSError:
            pass
    sys.stderr.write(line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
