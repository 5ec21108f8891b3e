"""The API server, by the official Kubernetes client's configuration and connections. The only module that imports it.

Requests are made on the client's own connection pool: objects stay the plain dicts that `manifest` makes, and both the generated methods
and their names differ between the client's releases, while configuration, authentication and pool do not.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

from launcher.errors import ClusterUnavailable
from launcher.k8s.refusals import ApiRefused

FIELD_MANAGER = "railhead"
PLURALS: Mapping[str, tuple[str, str]] = {
    "RayJob": ("/apis/ray.io/v1", "rayjobs"),
    "RayCronJob": ("/apis/ray.io/v1", "raycronjobs"),
    "CronJob": ("/apis/batch/v1", "cronjobs"),
    "ServiceAccount": ("/api/v1", "serviceaccounts"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Secret": ("/api/v1", "secrets"),
    "Service": ("/api/v1", "services"),
    "Pod": ("/api/v1", "pods"),
    "Event": ("/api/v1", "events"),
    "Node": ("/api/v1", "nodes"),
    "Role": ("/apis/rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("/apis/rbac.authorization.k8s.io/v1", "rolebindings"),
    "PodDisruptionBudget": ("/apis/policy/v1", "poddisruptionbudgets"),
    "NetworkPolicy": ("/apis/networking.k8s.io/v1", "networkpolicies"),
    "PodMonitor": ("/apis/monitoring.coreos.com/v1", "podmonitors"),
}
_RETRIED = (429, 500, 502, 503, 504)
_MAX_TRIES = 6
_TIMEOUT_S = 30.0
_METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"


@dataclass(frozen=True)
class Scope:
    """Where a command works."""

    namespace: str
    server: str


class Kube:
    """One API server. Every call blocks, with a deadline; for use by one thread."""

    def __init__(self, context: str | None = None, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """`context`: of the kubeconfig; None: its current one, or in a pod the pod's own account. Raises ClusterUnavailable."""
        self._sleep = sleep
        try:
            from kubernetes import client, config
        except ImportError as error:
            raise ClusterUnavailable(
                "the Kubernetes client is not installed", advice='pip install "railhead[k8s]"'
            ) from error
        configuration = client.Configuration()
        try:
            self.namespace = _load(config, configuration, context)
        except config.ConfigException as error:
            raise ClusterUnavailable(
                f"no cluster to talk to: {error}",
                advice="set KUBECONFIG, or choose a --context that `kubectl config get-contexts` shows",
            ) from error
        self._configuration = configuration
        self._api = client.ApiClient(configuration)
        self._pool = self._api.rest_client.pool_manager

    @property
    def server(self) -> str:
        return str(self._configuration.host)

    def close(self) -> None:
        self._pool.clear()

    # Whole answers.

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any]:
        return self._request("GET", _path(kind, namespace, name))

    def exists(self, kind: str, namespace: str, name: str) -> bool:
        """Only its metadata comes here: of a Secret, not its values."""
        try:
            self._request("GET", _path(kind, namespace, name), accept=_METADATA_ONLY)
        except ApiRefused as refusal:
            # A missing kind is said otherwise than a missing object.
            if refusal.code == 404 and refusal.details.get("name"):
                return False
            raise
        return True

    def list(self, kind: str, namespace: str, **query: str) -> dict[str, Any]:
        """All pages of a list; `query` in the API's spelling (labelSelector, fieldSelector)."""
        asked = {"limit": "250", **query}
        found = self._request("GET", _path(kind, namespace), asked)
        num_begun = 1
        while found.get("metadata", {}).get("continue"):
            try:
                page = self._request(
                    "GET", _path(kind, namespace), {**asked, "continue": found["metadata"]["continue"]}
                )
                found = {**page, "items": [*found["items"], *page["items"]]}
            except ApiRefused as refusal:
                # The pages belong to one moment, and the server has forgotten it: from the beginning, at last in one piece.
                if refusal.code != 410 or num_begun == _MAX_TRIES:
                    raise
                num_begun += 1
                if num_begun == _MAX_TRIES:
                    asked = dict(query)
                found = self._request("GET", _path(kind, namespace), asked)
        return found

    def create(self, one: Mapping[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        """Refused (409) if it exists, which after a cut may be by our own hand. Unknown fields are refused, not dropped."""
        return self._request("POST", _path(one["kind"], one["metadata"]["namespace"]), _strictly(dry_run), one)

    def apply(self, one: Mapping[str, Any], *, dry_run: bool = False) -> dict[str, Any]:
        """Server-side apply: makes it, or makes it so. Ours over other managers' values of the same fields."""
        path = _path(one["kind"], one["metadata"]["namespace"], one["metadata"]["name"])
        query = {**_strictly(dry_run), "fieldManager": FIELD_MANAGER, "force": "true"}
        return self._request("PATCH", path, query, one, "application/apply-patch+yaml")

    def delete(self, kind: str, namespace: str, name: str) -> bool:
        """With all that belongs to it. False: it was not there."""
        try:
            self._request("DELETE", _path(kind, namespace, name), {"propagationPolicy": "Background"})
        except ApiRefused as refusal:
            if refusal.code == 404:
                return False
            raise
        return True

    # Streams. They end when the server ends them, or the connection is cut: the caller goes on from where it was.

    def watch(
        self, kind: str, namespace: str, resource_version: str, timeout_s: int, **query: str
    ) -> Iterator[dict[str, Any]]:
        """Events from this version on, for at most so long. Raises ApiRefused(410) when the version is too old: list again."""
        asked = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(timeout_s),
            **query,
        }
        for line in self._lines(_path(kind, namespace), asked, timeout_s + 10):
            event = json.loads(line)
            if event["type"] == "ERROR":
                status = event["object"]
                raise ApiRefused(int(status.get("code", 500)), status.get("reason", ""), status.get("message", ""))
            yield event

    def log_lines(
        self, namespace: str, pod: str, since_time: str | None, timeout_s: float, container: str
    ) -> Iterator[str]:
        """A container's log as it grows, each line with its time in front; whole lines only. Silence longer than `timeout_s` ends it."""
        query = {"follow": "true", "timestamps": "true", "container": container}
        if since_time is not None:
            query["sinceTime"] = since_time
        for line in self._lines(f"{_path('Pod', namespace, pod)}/log", query, timeout_s):
            yield line.decode(errors="replace")

    def _lines(self, path: str, query: Mapping[str, str], timeout_s: float) -> Iterator[bytes]:
        import urllib3

        try:
            response = self._send("GET", path, query, None, "application/json", timeout_s)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise ApiRefused(503, "Unreachable", str(error)) from error
        rest = b""
        try:
            for piece in response.stream(64 * 1024, decode_content=True):
                *lines, rest = (rest + piece).split(b"\n")
                yield from lines
        except (urllib3.exceptions.HTTPError, OSError):
            return  # cut, or silent for too long; half a line is asked for again
        finally:
            with contextlib.suppress(Exception):
                response.close()

    def _request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> dict[str, Any]:
        import urllib3

        fault: Exception | None = None
        for attempt_idx in range(_MAX_TRIES):
            try:
                response = self._send(method, path, query or {}, body, content_type, _TIMEOUT_S, accept)
                try:
                    answer: dict[str, Any] = json.loads(response.read() or b"{}")
                finally:
                    response.release_conn()
                return answer
            except ApiRefused as refusal:
                if refusal.code not in _RETRIED:
                    raise
                fault = refusal
                self._sleep(float(refusal.details.get("retryAfterSeconds") or 2**attempt_idx * 0.5))
            except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
                fault = error
                self._sleep(2**attempt_idx * 0.5)
        if isinstance(fault, ApiRefused):
            raise fault
        raise ClusterUnavailable(
            f"the API server at {self.server} does not answer: {fault}",
            advice="is the cluster up, and the VPN? kubectl cluster-info asks the same",
        ) from fault

    def _send(
        self,
        method: str,
        path: str,
        query: Mapping[str, str],
        body: Mapping[str, Any] | None,
        content_type: str,
        timeout_s: float,
        accept: str = "application/json",
    ) -> Any:
        """An open answer. Raises ApiRefused for one that is no success."""
        import urllib3

        headers = {"Accept": accept, "Content-Type": content_type, "User-Agent": "railhead"}
        for setting in dict[str, Any](self._configuration.auth_settings()).values():
            if setting["in"] == "header" and setting["value"]:
                headers[setting["key"]] = setting["value"]
        url = f"{self.server}{path}{'?' + urlencode(query) if query else ''}"
        response = self._pool.request(
            method,
            url,
            body=json.dumps(body) if body is not None else None,
            headers=headers,
            preload_content=False,
            timeout=urllib3.Timeout(connect=10.0, read=timeout_s),
            retries=False,
        )
        if response.status >= 400:
            raise _refused(response.status, response.read(), response.headers.get("Retry-After"))
        return response


def _refused(code: int, body: bytes, retry_after: str | None) -> ApiRefused:
    """The Status object, or whatever a proxy in between says."""
    try:
        status = json.loads(body)
    except ValueError:
        status = {"message": body[:200].decode(errors="replace")}
    details = dict(status.get("details") or {})
    if retry_after and retry_after.isdigit():
        details.setdefault("retryAfterSeconds", int(retry_after))
    return ApiRefused(code, str(status.get("reason") or ""), str(status.get("message") or ""), details)


def _load(config: Any, configuration: Any, context: str | None) -> str:
    """Fills `configuration`; the namespace that the context works in."""
    import os

    if context is None and "KUBECONFIG" not in os.environ and "KUBERNETES_SERVICE_HOST" in os.environ:
        config.load_incluster_config(configuration)
        with contextlib.suppress(OSError), open("/var/run/secrets/kubernetes.io/serviceaccount/namespace") as file:
            return file.read().strip()
        return "default"
    # Named here, because the client reads the variable once, when it is imported.
    path = os.environ.get("KUBECONFIG") or None
    config.load_kube_config(config_file=path, context=context, client_configuration=configuration)
    contexts, active = config.list_kube_config_contexts(config_file=path)
    chosen = next((one for one in contexts if one["name"] == context), active)
    return str(chosen["context"].get("namespace") or "default")


def _path(kind: str, namespace: str, name: str | None = None) -> str:
    prefix, plural = PLURALS[kind]
    scope = "" if kind == "Node" else f"/namespaces/{namespace}"
    return f"{prefix}{scope}/{plural}" + (f"/{name}" if name is not None else "")


def _strictly(dry_run: bool) -> dict[str, str]:
    return {"fieldValidation": "Strict", **({"dryRun": "All"} if dry_run else {})}
