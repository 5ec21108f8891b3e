"""Follows a job: what it waits for, then rank 0's output, then how it ended. Shell around `phases` and `logcursor`.

One thread. Waiting is a watch on the RayJob that the server ends every few seconds; between two watches the pods are looked at. The output
is that of the submitter's pod, where Ray's job log arrives.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from launcher.errors import ClusterUnavailable, LauncherError, SpecError
from launcher.k8s.client import Kube
from launcher.k8s.logcursor import LogCursor
from launcher.k8s.phases import Ending, Phase, ending, is_placed, phase_of
from launcher.k8s.pods import JOB_LABEL, ROLE_LABEL, SUBMITTER
from launcher.k8s.refusals import ApiRefused, explain

WATCH_S = 5
"""Pods are looked at this often while the job waits. A gang of hundreds is one list request."""
LOG_SILENCE_S = 30.0
"""After so long without a line the job's state is asked for, and the log is opened again where it was."""


class Screen:
    """Where lines go: people read sentences on standard error and the job's output on standard output; programs read JSON lines."""

    def __init__(self, *, as_json: bool, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._as_json = as_json
        self._out, self._err = out or sys.stdout, err or sys.stderr

    def say(self, event: str, text: str, **fields: Any) -> None:
        if self._as_json:
            print(json.dumps({"event": event, "text": text, **fields}), file=self._out, flush=True)
        else:
            print(f"launcher: {text}", file=self._err, flush=True)

    def output(self, line: str) -> None:
        if self._as_json:
            print(json.dumps({"event": "output", "line": line}), file=self._out, flush=True)
        else:
            print(line, file=self._out, flush=True)


class Hopeless(SpecError):
    """The job's pods can never start as they are."""


class Follower:
    """Follows one RayJob. `gives_up`: raises Hopeless where no waiting helps, instead of waiting on."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        name: str,
        screen: Screen,
        *,
        gives_up: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._gives_up = gives_up
        self._kube, self._namespace, self._name, self._screen, self._sleep = kube, namespace, name, screen, sleep
        self._said: Phase | None = None
        self._version = ""
        self._cursor, self._pod = LogCursor(), ""

    def until_placed(self) -> Ending | None:
        """Returns once every pod has a node and its image; with the job's ending if it ended before."""
        job = self._relist()
        while not is_placed(self._tell(job)):
            job = self._next(job)
        return ending(job)

    def until_ended(self) -> Ending:
        """Blocks until the job has ended and its output is shown to the last line. Raises LauncherError if the job disappears."""
        job = self._relist()
        while True:
            phase = self._tell(job)
            if phase.name == "training":
                self._show_output()
                job = self._relist()
                if ending(job) is None:
                    job = self._next(job)
            elif phase.name == "ended":
                self._show_output()
                end = ending(job)
                assert end is not None
                return end
            else:
                job = self._next(job)

    def show_output(self) -> None:
        """What there is, and what comes until the pod ends or is silent."""
        self._show_output()

    def phase(self) -> Phase:
        return self._phase(self._relist())

    def _tell(self, job: Mapping[str, Any]) -> Phase:
        phase = self._phase(job)
        if phase != self._said:
            self._said = phase
            if phase.name != "ended":  # how it ended is said once, after the last line of its output
                self._screen.say("phase", str(phase), phase=phase.name, detail=phase.detail)
        if phase.is_hopeless and self._gives_up:
            raise Hopeless(phase.detail, advice="the job was deleted; give another --image and submit again")
        return phase

    def _phase(self, job: Mapping[str, Any]) -> Phase:
        if ending(job) is not None or job.get("status", {}).get("jobDeploymentStatus") == "Running":
            return phase_of(job, [], [], 0.0)
        selector = f"{JOB_LABEL}={job['metadata'].get('labels', {}).get(JOB_LABEL, self._name)}"
        pods = self._kube.list("Pod", self._namespace, labelSelector=selector)["items"]
        cluster = job.get("status", {}).get("rayClusterName")
        own = [
            pod
            for pod in pods
            if cluster in (None, "", pod["metadata"].get("labels", {}).get("ray.io/cluster", cluster))
        ]
        return phase_of(job, own, self._events(), _age_s(job))

    def _events(self) -> list[dict[str, Any]]:
        """Of objects that carry the job's name; a follower without the right to see events does without."""
        try:
            items = self._kube.list("Event", self._namespace)["items"]
        except ApiRefused:
            return []
        own = [one for one in items if self._name in one.get("involvedObject", {}).get("name", "")]
        return sorted(own, key=lambda one: one.get("lastTimestamp") or one.get("eventTime") or "")

    def _relist(self) -> dict[str, Any]:
        try:
            found = self._kube.list("RayJob", self._namespace, fieldSelector=f"metadata.name={self._name}")
        except ApiRefused as refusal:
            raise explain(refusal, "RayJob", self._name, self._namespace) from refusal
        self._version = found["metadata"].get("resourceVersion", "")
        if not found["items"]:
            raise self._gone()
        job: dict[str, Any] = found["items"][0]
        return job

    def _next(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job after its next change, or after a few seconds without one."""
        latest = job
        try:
            for event in self._kube.watch(
                "RayJob", self._namespace, self._version, WATCH_S, fieldSelector=f"metadata.name={self._name}"
            ):
                self._version = event["object"]["metadata"].get("resourceVersion", self._version)
                if event["type"] == "DELETED":
                    raise self._gone()
                if event["type"] != "BOOKMARK":
                    latest = event["object"]
                    break
        except ApiRefused as refusal:
            if refusal.code not in (410, 429, 500, 502, 503, 504):
                raise explain(refusal, "RayJob", self._name, self._namespace) from refusal
            self._sleep(0.2 if refusal.code == 410 else 1.0)
            return self._relist()
        return latest

    def _show_output(self) -> None:
        """The submitter's log from where we are to its end, or to a cut, or to a silence."""
        pods = self._submitters()
        if not pods:
            return
        pod = max(pods, key=lambda one: str(one["metadata"].get("creationTimestamp", "")))["metadata"]["name"]
        if self._pod not in ("", pod):
            self._screen.say("note", f"the submitter's pod was replaced by {pod}: its output begins again")
            self._cursor = LogCursor()
        self._pod = pod
        self._cursor.reconnected()
        try:
            for line in self._kube.log_lines(self._namespace, pod, self._cursor.since_time, LOG_SILENCE_S, SUBMITTER):
                text = self._cursor.take(line)
                if text is not None:
                    self._screen.output(text)
        except ApiRefused as refusal:
            if refusal.code == 403:
                raise explain(refusal, "Pod", pod, self._namespace) from refusal
            self._sleep(1.0)  # its container has not started yet, or the pod is gone already

    def _submitters(self) -> list[dict[str, Any]]:
        """Pods with the container that submits: one of the Job's own, or in SidecarMode the head. HTTPMode has none."""
        own: list[dict[str, Any]] = self._kube.list(
            "Pod", self._namespace, labelSelector=f"batch.kubernetes.io/job-name={self._name}"
        )["items"]
        if own:
            return own
        heads = self._kube.list("Pod", self._namespace, labelSelector=f"{JOB_LABEL}={self._name},{ROLE_LABEL}=head")
        return [
            pod
            for pod in heads["items"]
            if any(one["name"] == SUBMITTER for one in pod.get("spec", {}).get("containers", []))
        ]

    def _gone(self) -> LauncherError:
        return ClusterUnavailable(
            f"RayJob {self._namespace}/{self._name} is not there (any more)",
            advice=f"somebody deleted it? python -m launcher list --namespace {self._namespace}",
        )


def _age_s(job: Mapping[str, Any]) -> float:
    text = job["metadata"].get("creationTimestamp")
    if not text:
        return 0.0
    return (datetime.now(UTC) - datetime.fromisoformat(text.replace("Z", "+00:00"))).total_seconds()
