"""What a RayJob needs around it: account, code, disruption budget, network policy, pod monitor. Pure; each function gives whole objects."""

from __future__ import annotations

from typing import Any

from launcher.k8s import peers
from launcher.k8s.choices import CacheMode
from launcher.k8s.options import CACHE_PORT, PEER_PORT, KubeJob
from launcher.k8s.pods import JOB_LABEL, ROLE_LABEL, service_account
from launcher.spec import host_and_port

DASHBOARD_PORT = 8265
RAY_METRICS_PORT = 8080


def metadata(job: KubeJob, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "namespace": job.kube.namespace,
        "labels": {JOB_LABEL: job.kube.name, **dict(job.kube.labels)},
    }


def account(job: KubeJob) -> list[dict[str, Any]]:
    """An account that may do nothing: neither Ray nor ranks nor the cache talk to Kubernetes. Not made where one is named."""
    name = service_account(job)
    if job.kube.service_account is not None or name is None:
        return []
    return [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": metadata(job, name),
            "automountServiceAccountToken": False,
        }
    ]


def code(job: KubeJob) -> list[dict[str, Any]]:
    if not job.kube.files:
        return []
    name = f"{job.kube.name}-code"
    return [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata(job, name), "data": dict(job.kube.files)}]


def peer_service(job: KubeJob) -> list[dict[str, Any]]:
    """Its name resolves to every worker's address, from the moment that the pod has one: the peers of the cache."""
    if not job.kube.cache.peers:
        return []
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": metadata(job, peers.service_name(job)),
            "spec": {
                "clusterIP": "None",
                "publishNotReadyAddresses": True,
                "selector": {JOB_LABEL: job.kube.name, ROLE_LABEL: "worker"},
                "ports": [{"name": peers.PORT_NAME, "port": PEER_PORT, "targetPort": peers.PORT_NAME}],
            },
        }
    ]


def peer_key(job: KubeJob) -> list[dict[str, Any]]:
    """The Secret of the job's own, yet without its key."""
    if not peers.makes_key(job):
        return []
    return [{"apiVersion": "v1", "kind": "Secret", "metadata": metadata(job, peers.secret_name(job)), "type": "Opaque"}]


def disruption_budget(job: KubeJob) -> list[dict[str, Any]]:
    """`minAvailable` as a number is the only form that Kubernetes takes for pods that no Deployment or the like owns.

    Spot workers are taken away whatever a budget says; there it guards the head, without which the job is over.
    """
    if not job.kube.disruption_budget:
        return []
    if job.kube.spot:
        roles, least = ["head"], 1
    else:
        roles, least = ["head", "worker"], 1 + job.spec.min_nodes
    selector = {
        "matchLabels": {JOB_LABEL: job.kube.name},
        "matchExpressions": [{"key": ROLE_LABEL, "operator": "In", "values": roles}],
    }
    return [
        {
            "apiVersion": "policy/v1",
            "kind": "PodDisruptionBudget",
            "metadata": metadata(job, job.kube.name),
            "spec": {"minAvailable": least, "selector": selector},
        }
    ]


def network_policy(job: KubeJob) -> list[dict[str, Any]]:
    """Who may connect: the job's own pods to all ports, the operator to the dashboard, monitoring to the metrics. Outgoing stays open:
    object stores, registries and DNS are the site's own."""
    if not job.kube.network_policy:
        return []
    own = {"podSelector": {"matchLabels": {JOB_LABEL: job.kube.name}}}
    ingress = [
        {"from": [own]},
        {"from": [_namespace(job.kube.operator_namespace)], "ports": [_port(DASHBOARD_PORT)]},
        {
            "from": [_namespace(job.kube.monitoring_namespace)],
            "ports": [
                _port(RAY_METRICS_PORT),
                *([_port(CACHE_PORT)] if job.kube.cache.mode is CacheMode.SIDECAR else []),
                *([_port(host_and_port("--metrics", job.spec.metrics)[1])] if job.spec.metrics else []),
            ],
        },
    ]
    return [
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": metadata(job, job.kube.name),
            "spec": {
                "podSelector": {"matchLabels": {JOB_LABEL: job.kube.name}},
                "policyTypes": ["Ingress"],
                "ingress": ingress,
            },
        }
    ]


def pod_monitor(job: KubeJob) -> list[dict[str, Any]]:
    """Ray's metrics (the port that KubeRay names `metrics`), the cache's, and with `--metrics` the launcher's, which runs in the head."""
    if not job.kube.pod_monitor:
        return []
    ports = ["metrics", *(["cache-metrics"] if job.kube.cache.mode is CacheMode.SIDECAR else [])]
    return [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PodMonitor",
            "metadata": metadata(job, job.kube.name),
            "spec": {
                "selector": {"matchLabels": {JOB_LABEL: job.kube.name}},
                "podTargetLabels": [JOB_LABEL, ROLE_LABEL],
                "podMetricsEndpoints": [{"port": port, "path": "/metrics"} for port in ports],
            },
        },
        *_launcher_monitor(job),
    ]


def _launcher_monitor(job: KubeJob) -> list[dict[str, Any]]:
    if not job.spec.metrics:
        return []
    _, port = host_and_port("--metrics", job.spec.metrics)
    # A port of container 0 that is listed takes KubeRay's own from the head (rule head-ports), so the target is made of Ray's port.
    address = {"sourceLabels": ["__meta_kubernetes_pod_ip"], "replacement": f"$1:{port}", "targetLabel": "__address__"}
    return [
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PodMonitor",
            "metadata": metadata(job, f"{job.kube.name}-launcher"),
            "spec": {
                "selector": {"matchLabels": {JOB_LABEL: job.kube.name, ROLE_LABEL: "head"}},
                "podTargetLabels": [JOB_LABEL],
                "podMetricsEndpoints": [{"port": "metrics", "path": "/metrics", "relabelings": [address]}],
            },
        }
    ]


def _namespace(name: str) -> dict[str, Any]:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _port(number: int) -> dict[str, Any]:
    return {"protocol": "TCP", "port": number}
