"""A Kubernetes API server small enough to read, spoken to over real HTTP: create, server-side apply, dry run, strict fields, paged lists,
watch with bookmarks and expiry, logs that are cut, refusals on demand.

Nothing happens in it by itself. `when` says what happens once the client asks for something: tests need neither sleep nor second thread.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.launcher.k8s.schemas import faults, schemas, unknown_fields

Key = tuple[str, str, str]
CUSTOM = {"rayjobs": "RayJob", "raycronjobs": "RayCronJob", "podmonitors": "PodMonitor"}


@dataclass
class Hook:
    """Runs once, at the `count`-th request whose line has all of these words."""

    words: tuple[str, ...]
    count: int
    action: Callable[[], None]


@dataclass
class Fault:
    """The next `times` requests whose line has all of these words get this answer."""

    words: tuple[str, ...]
    times: int
    code: int
    reason: str = ""
    message: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    skip: int = 0
    """So many of them are served first."""


@dataclass
class Cut:
    """One request whose line has all of these words is done, and its answer lost: the connection closes."""

    words: tuple[str, ...]
    skip: int = 0


@dataclass
class Log:
    lines: list[str] = field(default_factory=list)
    is_ended: bool = False
    cut_after_bytes: list[int] = field(default_factory=list)
    """One for each connection to come: after so many bytes the connection breaks, in the middle of a line if it falls so."""


class FakeApiServer:
    """All state under one condition variable; every change wakes watchers and log readers."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.objects: dict[Key, dict[str, Any]] = {}
        self.history: list[tuple[int, str, str, dict[str, Any]]] = []
        self.version = 100
        self.oldest_version = 0
        self.namespaces = {"default", "ml"}
        self.missing_kinds: set[str] = set()
        self.dropped_fields: list[str] = []
        """Fields of RayJob's spec that this cluster's older CRD does not have."""
        self.requests: list[str] = []
        self.hooks: list[Hook] = []
        self.faults: list[Fault] = []
        self.cuts: list[Cut] = []
        self.managers: dict[Key, str] = {}
        """Who applied an object last: another one must force its way."""
        self.logs: dict[str, Log] = {}
        self.bookmarks_only: int = 0
        """So many watches to come send a bookmark and end."""
        self.page_size: int | None = None
        self.expired_pages = 0
        """So many further pages to come are of a moment that is forgotten."""
        self.expires_by_status = False
        """An expired watch is refused with HTTP 410; else it is opened, and the error comes as its first event. Servers do both."""
        self.cut_watches: list[int] = []
        """One for each watch to come that has something to say: after so many bytes its connection breaks."""

    # What tests do.

    def when(self, *words: str, count: int = 1, then: Callable[[], None]) -> None:
        self.hooks.append(Hook(words, count, then))

    def fail(
        self, *words: str, code: int, times: int = 1, reason: str = "", message: str = "", skip: int = 0, **headers: str
    ) -> None:
        found = {key.replace("_", "-"): value for key, value in headers.items()}
        self.faults.append(Fault(words, times, code, reason, message, found, skip))

    def cut_answers(self, *words: str, skip: int = 0) -> None:
        self.cuts.append(Cut(words, skip))

    def put(self, plural: str, one: dict[str, Any]) -> dict[str, Any]:
        with self.changed:
            return self._store(plural, copy.deepcopy(one))

    def set_status(self, name: str, namespace: str = "default", **status: Any) -> None:
        with self.changed:
            job = copy.deepcopy(self.objects["rayjobs", namespace, name])
            job["status"] = {**job.get("status", {}), **status}
            self._store("rayjobs", job)

    def compact(self) -> None:
        """Forgets the past: a watch from before is answered with 410."""
        with self.changed:
            self.version += 1
            self.oldest_version = self.version

    def log(self, pod: str, *lines: str, ended: bool = False) -> None:
        with self.changed:
            log = self.logs.setdefault(pod, Log())
            log.lines += lines
            log.is_ended = ended
            self.changed.notify_all()

    def names(self, plural: str) -> set[str]:
        with self.changed:
            return {name for kind, _, name in self.objects if kind == plural}

    # What the API server does.

    def _store(self, plural: str, one: dict[str, Any]) -> dict[str, Any]:
        meta = one["metadata"]
        key = (plural, meta.get("namespace", ""), meta["name"])
        self.version += 1
        meta["resourceVersion"] = str(self.version)
        meta.setdefault("uid", f"uid-{self.version}")
        meta.setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        verb = "MODIFIED" if key in self.objects else "ADDED"
        self.objects[key] = one
        self.history.append((self.version, verb, plural, copy.deepcopy(one)))
        self.changed.notify_all()
        return one

    def _delete(self, key: Key) -> None:
        one = self.objects.pop(key)
        self.version += 1
        one["metadata"]["resourceVersion"] = str(self.version)
        self.history.append((self.version, "DELETED", key[0], one))
        owned = [
            k
            for k, o in self.objects.items()
            if one["metadata"]["uid"] in [r["uid"] for r in o["metadata"].get("ownerReferences", [])]
        ]
        for other in owned:
            self._delete(other)
        self.changed.notify_all()


@contextmanager
def serving(folder: Path) -> Iterator[tuple[FakeApiServer, Path]]:
    """The server, and a kubeconfig for it."""
    state = FakeApiServer()
    handler = type("Handler", (_Handler,), {"state": state})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
            "users": [{"name": "me", "user": {"token": "sesame"}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me", "namespace": "default"}}],
            "current-context": "fake",
        }
        path = folder / "kubeconfig"
        path.write_text(yaml.safe_dump(config))
        try:
            yield state, path
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeApiServer
    _is_cut = False
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PATCH(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        line = f"{self.command} {self.path}"
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        with self.state.changed:
            self.state.requests.append(line)
            fault = self._due_fault(line)
            self._is_cut = self._due_cut(line)
            due = []
            for hook in list(self.state.hooks):
                if all(word in line for word in hook.words):
                    hook.count -= 1
                    if hook.count == 0:
                        due.append(hook)
                        self.state.hooks.remove(hook)
        for hook in due:
            hook.action()
        if self.headers.get("Authorization") != "Bearer sesame":
            return self._status(401, "Unauthorized", "Unauthorized")
        if fault is not None:
            return self._status(fault.code, fault.reason, fault.message, headers=fault.headers)
        return self._route(body)

    def _due_fault(self, line: str) -> Fault | None:
        for fault in self.state.faults:
            if fault.times and all(word in line for word in fault.words):
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.times -= 1
                return fault
        return None

    def _due_cut(self, line: str) -> bool:
        for cut in self.state.cuts:
            if all(word in line for word in cut.words):
                if cut.skip:
                    cut.skip -= 1
                    continue
                self.state.cuts.remove(cut)
                return True
        return False

    def _route(self, body: Any) -> None:
        url = urlsplit(self.path)
        query = {key: found[-1] for key, found in parse_qs(url.query).items()}
        parts = [part for part in url.path.split("/") if part]
        parts = parts[2:] if parts[0] == "api" else parts[3:]
        namespace = ""
        if parts[0] == "namespaces":
            namespace, parts = parts[1], parts[2:]
        plural, name = parts[0], parts[1] if len(parts) > 1 else None
        if plural in self.state.missing_kinds:
            return self._status(404, "NotFound", "the server could not find the requested resource")
        if namespace and namespace not in self.state.namespaces:
            message = f'namespaces "{namespace}" not found'
            return self._status(404, "NotFound", message, details={"kind": "namespaces", "name": namespace})
        if self.command == "GET" and parts[2:] == ["log"]:
            return self._log(parts[1], query)
        if self.command == "GET" and name is None:
            return self._watch(plural, namespace, query) if query.get("watch") else self._list(plural, namespace, query)
        if self.command in ("POST", "PATCH"):
            return self._write(plural, namespace, body, query)
        return self._one((plural, namespace, str(name)))

    def _one(self, key: Key) -> None:
        with self.state.changed:
            one = self.state.objects.get(key)
            if one is not None and self.command == "DELETE":
                self.state._delete(key)
        if one is None:
            return self._status(
                404, "NotFound", f'{key[0]} "{key[2]}" not found', details={"kind": key[0], "name": key[2]}
            )
        return self._json(200, one)

    def _write(self, plural: str, namespace: str, one: dict[str, Any], query: dict[str, str]) -> None:
        fault = self._validation(plural, one) if query.get("fieldValidation") == "Strict" else None
        if fault:
            return self._status(400, "BadRequest", f"strict decoding error: {fault}")
        key = (plural, namespace, one["metadata"]["name"])
        with self.state.changed:
            known = self.state.objects.get(key)
            if self.command == "POST" and known is not None:
                return self._status(409, "AlreadyExists", f'{plural} "{key[2]}" already exists')
            manager = query.get("fieldManager", "creator")
            owner = self.state.managers.get(key, manager)
            if known is not None and owner != manager and query.get("force") != "true":
                message = f'Apply failed with 1 conflict: conflict with "{owner}"'
                return self._status(409, "Conflict", message)
            if query.get("dryRun") == "All":
                return self._json(200, one)
            self.state.managers[key] = manager
            if known is not None:
                one["metadata"] = {**known["metadata"], **one["metadata"]}
            stored = self.state._store(plural, one)
        return self._json(201, stored)

    def _validation(self, plural: str, one: dict[str, Any]) -> str | None:
        kind = CUSTOM.get(plural)
        if kind is None:
            extra = [fault.split("'")[1] for fault in faults(one) if "Additional properties" in fault]
            return f'unknown field "{extra[0]}"' if extra else None
        for path in self.state.dropped_fields:
            if path in one["spec"] or path in one["spec"].get("rayClusterSpec", {}):
                inside = path if path in one["spec"] else f"rayClusterSpec.{path}"
                return f'unknown field "spec.{inside}"'
        found = unknown_fields(one, schemas()[f"{one['apiVersion']}/{kind}"])
        return found[0] if found else None

    def _matching(self, plural: str, namespace: str, query: dict[str, str]) -> Callable[[dict[str, Any]], bool]:
        def matches(one: dict[str, Any]) -> bool:
            meta = one["metadata"]
            if meta.get("namespace", "") != namespace:
                return False
            for selector in filter(None, query.get("labelSelector", "").split(",")):
                label, equals, value = selector.partition("=")
                if label not in meta.get("labels", {}) or (equals and meta["labels"][label] != value):
                    return False
            wanted = query.get("fieldSelector", "").removeprefix("metadata.name=")
            return not wanted or meta["name"] == wanted

        return matches

    def _list(self, plural: str, namespace: str, query: dict[str, str]) -> None:
        with self.state.changed:
            matches = self._matching(plural, namespace, query)
            items = [one for (kind, _, _), one in sorted(self.state.objects.items()) if kind == plural and matches(one)]
            size = self.state.page_size if self.state.page_size and "limit" in query else len(items) or 1
            first = int(query.get("continue", "0"))
            if first and self.state.expired_pages:
                self.state.expired_pages -= 1
                return self._status(410, "Expired", "The provided continue parameter is too old")
            metadata: dict[str, Any] = {"resourceVersion": str(self.state.version)}
            if first + size < len(items):
                metadata["continue"] = str(first + size)
            return self._json(200, {"kind": "List", "metadata": metadata, "items": items[first : first + size]})

    def _watch(self, plural: str, namespace: str, query: dict[str, str]) -> None:
        version = int(query["resourceVersion"])
        with self.state.changed:
            is_expired = version < self.state.oldest_version
        if is_expired and self.state.expires_by_status:
            return self._status(410, "Expired", "too old resource version")
        self._start_stream("application/json")
        with self.state.changed:
            if is_expired:
                status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
                return self._end_stream([{"type": "ERROR", "object": status}])
            if self.state.bookmarks_only:
                self.state.bookmarks_only -= 1
                mark = {"kind": "RayJob", "metadata": {"resourceVersion": str(self.state.version)}}
                return self._end_stream([{"type": "BOOKMARK", "object": mark}])
            matches = self._matching(plural, namespace, query)

            def news() -> list[dict[str, Any]]:
                return [
                    {"type": verb, "object": one}
                    for at, verb, kind, one in self.state.history
                    if at > version and kind == plural and matches(one)
                ]

            self.state.changed.wait_for(lambda: bool(news()), timeout=float(query["timeoutSeconds"]))
            found = news()
            if found and self.state.cut_watches:
                text = b"".join(json.dumps(event).encode() + b"\n" for event in found)
                self._chunk(text[: self.state.cut_watches.pop(0)])
                self.close_connection = True
                return None
            mark = {"kind": "Bookmark", "metadata": {"resourceVersion": str(self.state.version)}}
            return self._end_stream([*found, {"type": "BOOKMARK", "object": mark}])

    def _log(self, pod: str, query: dict[str, str]) -> None:
        with self.state.changed:
            log = self.state.logs.get(pod)
            if log is None:
                return self._status(
                    400, "BadRequest", f'container "ray-job-submitter" in pod "{pod}" is waiting to start'
                )
            budget = log.cut_after_bytes.pop(0) if log.cut_after_bytes else None
            since = query.get("sinceTime", "")[:19]  # the API server counts whole seconds
            self._start_stream("text/plain")
            num_sent = 0
            while True:
                fresh = [line for line in log.lines[num_sent:] if line[:19] >= since]
                num_sent = len(log.lines)
                data = "".join(f"{line}\n" for line in fresh).encode()
                if budget is not None and len(data) >= budget:
                    self._chunk(data[:budget])
                    self.close_connection = True
                    return None  # no last chunk: the client sees a broken connection
                if budget is not None:
                    budget -= len(data)
                if data:
                    self._chunk(data)
                if log.is_ended:
                    return self._chunk(b"")
                self.state.changed.wait(timeout=20)

    def _start_stream(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _end_stream(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            self._chunk(json.dumps(event).encode() + b"\n")
        self._chunk(b"")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _status(
        self,
        code: int,
        reason: str,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        status = {
            "kind": "Status",
            "status": "Failure",
            "code": code,
            "reason": reason,
            "message": message,
            "details": details or {},
        }
        self._json(code, status, headers)

    def _json(self, code: int, one: Any, headers: dict[str, str] | None = None) -> None:
        if self._is_cut:
            self.close_connection = True
            return
        data = json.dumps(one).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)
