"""What a pod needs so that NCCL can reach the fabric: devices, networks, rights, files. Pure.

Values are those of the vendors' own manifests. Only wiring is here, what a process cannot give itself: NCCL's settings are decided on the
node, where `launcher.fabric` sees the devices, and each comes with its reason there.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.errors import SpecError
from launcher.k8s.fabric_gke import gke_rdma, gke_tcpx, gke_tcpxo
from launcher.k8s.options import KubeOptions
from launcher.k8s.wiring import Wiring

HUGEPAGES = "hugepages-2Mi"
_ZONE = "topology.kubernetes.io/zone"
EFA_DEVICES = {
    "p4d.24xlarge": 4,
    "p4de.24xlarge": 4,
    "p5.4xlarge": 1,
    "p5.48xlarge": 32,
    "p5e.48xlarge": 32,
    "p5en.48xlarge": 16,
    "p6-b200.48xlarge": 8,
    "p6e-gb200.36xlarge": 4,
}
"""EFA devices of an instance type, as its device plugin counts them."""


def _none(kube: KubeOptions) -> Wiring:
    return Wiring()


def _ib(kube: KubeOptions) -> Wiring:
    return Wiring(resources={kube.fabric_resource or "rdma/ib": "1"}, locks_memory=True)


def _roce(kube: KubeOptions) -> Wiring:
    if not kube.fabric_networks:
        raise SpecError(
            "--fabric roce needs the networks of the NICs' virtual functions",
            advice="name the NetworkAttachmentDefinitions, one for each NIC: --fabric-networks rail-0,rail-1; "
            "where the nodes' own network carries RDMA, use --fabric roce-host",
        )
    resource = kube.fabric_resource or "nvidia.com/sriov-rdma-vf"
    return Wiring(
        resources={resource: str(len(kube.fabric_networks))},
        annotations={"k8s.v1.cni.cncf.io/networks": ",".join(kube.fabric_networks)},
        locks_memory=True,
    )


def _roce_host(kube: KubeOptions) -> Wiring:
    # The device files come through a hostPath, and opening them without a device plugin needs a privileged container.
    return Wiring(
        volumes=({"name": "infiniband", "hostPath": {"path": "/dev/infiniband", "type": "Directory"}},),
        mounts=({"name": "infiniband", "mountPath": "/dev/infiniband"},),
        locks_memory=True,
        privileged=True,
        host_network=True,
        note="host network and a privileged container: one worker per node, and a policy that allows both",
    )


def _efa(kube: KubeOptions) -> Wiring:
    count = EFA_DEVICES.get(kube.instance_type or "")
    if count is None:
        asked = (
            f"--instance-type {kube.instance_type} is not" if kube.instance_type else "--instance-type is missing, not"
        )
        raise SpecError(
            f"--fabric efa: {asked} among those whose EFA devices are known",
            advice=f"give one of {', '.join(EFA_DEVICES)}",
        )
    return Wiring(
        resources={"vpc.amazonaws.com/efa": str(count), HUGEPAGES: "5120Mi"},
        locks_memory=True,
        note=""
        if _ZONE in kube.node_selector
        else f"EFA reaches within one availability zone only: pin it with --node-selector {_ZONE}=…",
    )


def _azure(kube: KubeOptions) -> Wiring:
    """The SR-IOV plugin counts eight `rdma/ib`; the shared-device plugin's resource, named by the user, is taken once."""
    resource, count = (kube.fabric_resource, "1") if kube.fabric_resource else ("rdma/ib", "8")
    return Wiring(resources={resource: count}, locks_memory=True)


def _oci(kube: KubeOptions) -> Wiring:
    return _roce_host(kube)


def _coreweave(kube: KubeOptions) -> Wiring:
    # The amount is a flag there: 1 gives the pod all of the node's NICs.
    return Wiring(resources={"rdma/ib": "1"}, locks_memory=True)


FABRICS: Mapping[str, Callable[[KubeOptions], Wiring]] = {
    "none": _none,
    "ib": _ib,
    "roce": _roce,
    "roce-host": _roce_host,
    "efa": _efa,
    "gke-rdma": gke_rdma,
    "gke-tcpxo": gke_tcpxo,
    "gke-tcpx": gke_tcpx,
    "azure": _azure,
    "oci": _oci,
    "coreweave": _coreweave,
}


# What people call them.
_ELSEWHERE = {
    "infiniband": "ib",
    "rdma": "ib",
    "aws": "efa",
    "eks": "efa",
    "gke": "gke-rdma",
    "gib": "gke-rdma",
    "tcpxo": "gke-tcpxo",
    "fastrak": "gke-tcpxo",
    "tcpx": "gke-tcpx",
    "aks": "azure",
    "oracle": "oci",
    "ethernet": "none",
}


def wire(kube: KubeOptions) -> Wiring:
    """The wiring of `--fabric`. Raises SpecError for a name that is none, or one that lacks what it needs."""
    if kube.fabric == "auto":
        raise SpecError(
            "--fabric auto looks at the cluster's nodes, and render never connects to one",
            advice=f"name it: {', '.join(FABRICS)}; submit --fabric auto looks and says what it found",
        )
    if kube.fabric not in FABRICS:
        words = {**_ELSEWHERE, **{name: name for name in FABRICS}}
        close = difflib.get_close_matches(kube.fabric.lower(), words, n=1, cutoff=0.6)
        raise SpecError(
            f"--fabric {kube.fabric}: no such fabric",
            advice=(f"did you mean {words[close[0]]}? " if close else "")
            + f"There are {', '.join((*FABRICS, 'auto'))}",
        )
    if not kube.gpus and kube.fabric != "none":
        raise SpecError(
            f"--fabric {kube.fabric} with --gpus 0: RDMA between nodes serves GPUs", advice="leave --fabric out"
        )
    return FABRICS[kube.fabric](kube)


_GKE = {
    "a3-ultragpu": "gke-rdma",
    "a4-highgpu": "gke-rdma",
    "a3-megagpu": "gke-tcpxo",
    "a3-highgpu": "gke-tcpx",
    "a3-edgegpu": "gke-tcpx",
}


@dataclass(frozen=True)
class Recognised:
    """A fabric that the nodes show, and by what."""

    fabric: str
    evidence: str
    instance_type: str | None = None
    resource: str | None = None


def recognise(nodes: Sequence[Mapping[str, Any]], gpu_resource: str) -> Recognised:
    """The fabric of the cluster's GPU nodes, from their labels and allocatable devices (`--fabric auto`). Pure.

    >>> node = {"metadata": {"labels": {}}, "status": {"allocatable": {"nvidia.com/gpu": "8", "rdma/ib": "1"}}}
    >>> recognise([node], "nvidia.com/gpu").fabric
    'ib'
    """
    with_gpus = [node for node in nodes if node.get("status", {}).get("allocatable", {}).get(gpu_resource, "0") != "0"]
    for node in with_gpus:
        labels = node.get("metadata", {}).get("labels", {})
        devices = node["status"]["allocatable"]
        kind = labels.get("node.kubernetes.io/instance-type", "")
        if devices.get("vpc.amazonaws.com/efa", "0") != "0" and kind in EFA_DEVICES:
            return Recognised("efa", f"nodes of type {kind} with {devices['vpc.amazonaws.com/efa']} EFA devices", kind)
        gke = next((fabric for start, fabric in _GKE.items() if kind.startswith(start)), None)
        if gke is not None:
            return Recognised(gke, f"nodes of type {kind}", kind)
        rdma = next((name for name in sorted(devices) if name.startswith("rdma/") and devices[name] != "0"), None)
        if any(key.startswith("ib.coreweave.cloud/") for key in labels):
            return Recognised("coreweave", "labels ib.coreweave.cloud/…")
        if any(key.startswith("oci.oraclecloud.com/rdma.") for key in labels):
            return Recognised("oci", "labels oci.oraclecloud.com/rdma.…")
        if kind.lower().startswith("standard_nd") and rdma:
            return Recognised(
                "azure", f"nodes of type {kind} with {rdma}", resource=None if rdma == "rdma/ib" else rdma
            )
        if rdma:
            return Recognised("ib", f"nodes with device {rdma}", resource=rdma)
    return Recognised("none", f"{len(with_gpus)} GPU nodes, and none shows RDMA devices")
