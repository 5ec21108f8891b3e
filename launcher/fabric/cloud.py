"""Which provider's network a node is on, and what that provider's own manifests set for it.

Recognised by what the facts show (labels, devices, DMI, files of the provider's plugin), never by a host name. The values are
those of the providers' published manifests and of SkyPilot's; each carries its source. Where a provider ships a script or a
plugin that sets its own values, the table says so and sets nothing that could fight with it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.fabric.facts import NodeFacts
from launcher.fabric.hcas import is_efa
from launcher.fabric.nccl import parse_version

GIB_SCRIPT = "/usr/local/gib/scripts/set_nccl_env.sh"
GIB_FOLDER = "/usr/local/gib"
TCPXO_SCRIPTS = (
    "/usr/local/nvidia/lib64/nccl-env-profile.sh",
    "/usr/local/fastrak/lib64/nccl-env-profile.sh",
    "/var/lib/tcpxo/lib64/nccl-env-profile.sh",
)
"""Where manifests mount it: GKE's guide, GKE's tests, a node itself."""
AZURE_TOPOLOGY = "/opt/microsoft/ndv5-topo.xml"
TCPX_PLUGIN = "/usr/local/tcpx"

MARKERS = (
    GIB_SCRIPT,
    GIB_FOLDER,
    *TCPXO_SCRIPTS,
    AZURE_TOPOLOGY,
    TCPX_PLUGIN,
    "/home/kubernetes/bin/gib",
    "/home/kubernetes/bin/nvidia/lib64",
    "/opt/microsoft/ncv4/topo.xml",
    "/opt/amazon/efa",
    "/opt/amazon/ofi-nccl",
    "/dev/aperture_devices",
    "/dev/nvidia-caps-imex-channels",
    "/dev/infiniband",
)
"""Files and folders whose presence is worth a fact."""


@dataclass(frozen=True)
class Setting:
    """One value of a provider, with its reason; value None: deliberately left unset."""

    value: str | None
    reason: str


@dataclass(frozen=True)
class Provider:
    """A recognised environment."""

    id: str
    title: str
    evidence: str
    settings: Mapping[str, Setting]
    source: str
    needs_plugin: str | None = None
    """What must be present for the fast network to be used at all, and is not; None when all is there."""
    owns_hcas: bool = False
    """The provider's plugin picks its devices itself: NCCL_IB_HCA stays unset."""


def recognise(facts: NodeFacts) -> Provider | None:
    """The provider of this node; None for machines of one's own or unknown ones."""
    for recogniser in (_aws_efa, _gke, _azure, _oci, _coreweave, _nebius_together):
        provider = recogniser(facts)
        if provider is not None:
            return provider
    return None


def instance_type(facts: NodeFacts) -> str | None:
    """The instance type, from the standard node label or, on AWS, from DMI."""
    labels = facts.kubernetes.labels
    for key in ("node.kubernetes.io/instance-type", "beta.kubernetes.io/instance-type"):
        if key in labels:
            return labels[key]
    return facts.platform.product if (facts.platform.vendor or "").startswith("Amazon") else None


def _label(facts: NodeFacts, *patterns: str) -> str | None:
    for key in facts.kubernetes.labels:
        if any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns):
            return f"label {key}={facts.kubernetes.labels[key]}"
    return None


def _aws_efa(facts: NodeFacts) -> Provider | None:
    devices = [hca for hca in facts.hcas if is_efa(facts, hca)]
    if not devices:
        return None
    plugin = parse_version(facts.software.ofi_nccl)
    if plugin is not None and plugin <= (1, 5, 99):
        efa = Setting("efa", "aws-ofi-nccl ≤ 1.5 does not choose the provider by itself")
    else:
        efa = Setting(None, "needed for aws-ofi-nccl ≤ 1.5 only; newer plugins choose the efa provider themselves")
    unset = "the aws-ofi-nccl plugin sets this for each instance type itself; a value here would fight with it"
    return Provider(
        "aws-efa",
        "AWS with EFA",
        f"{len(devices)} EFA devices ({devices[0].name}, …)",
        {
            "FI_PROVIDER": efa,
            "NCCL_BUFFSIZE": Setting(None, unset),
            "NCCL_P2P_NET_CHUNKSIZE": Setting(None, unset),
            "FI_EFA_USE_HUGE_PAGE": Setting(
                None, "0 is needed only if os.fork() fails with ENOMEM; give the pod hugepages-2Mi: 5120Mi instead"
            ),
        },
        "AWS EFA manifests; aws-ofi-nccl",
        owns_hcas=True,
    )


def _gke(facts: NodeFacts) -> Provider | None:
    kind = instance_type(facts) or ""
    on_gke = _label(facts, "cloud.google.com/gke-*")
    if on_gke is None and not kind.startswith(("a3-", "a4-", "a4x-")):
        return None
    evidence = f"instance type {kind}" if kind else str(on_gke)
    markers = set(facts.platform.markers)
    if kind.startswith(("a3-ultragpu", "a4-highgpu", "a4x-")):
        settings = {
            "NCCL_NET": Setting("gIB", "Google's RDMA plugin"),
            "NCCL_CROSS_NIC": Setting("0", "the rails of this fabric do not meet"),
            "NCCL_NET_GDR_LEVEL": Setting("PIX", "as Google's set_nccl_env.sh sets it"),
            "NCCL_IB_ADAPTIVE_ROUTING": Setting("1", "as Google's set_nccl_env.sh sets it"),
            "NCCL_IB_QPS_PER_CONNECTION": Setting("4", "as Google's set_nccl_env.sh sets it"),
            "NCCL_IB_TC": Setting("52", "traffic class of the fabric"),
            "NCCL_IB_FIFO_TC": Setting("84", "traffic class of the fabric's control messages"),
        }
        missing = None
        if not markers & {GIB_SCRIPT, GIB_FOLDER}:
            settings = {}
            missing = (
                "Google's gIB plugin is not mounted (hostPath /home/kubernetes/bin/gib at /usr/local/gib): "
                "NCCL falls back to TCP without a word"
            )
        return Provider(
            "gke-rdma", "GKE A3 Ultra / A4 (RDMA)", evidence, settings, "GKE manifests, set_nccl_env.sh", missing
        )
    if kind.startswith("a3-megagpu"):
        missing = (
            None
            if markers & set(TCPXO_SCRIPTS)
            else ("the TCPXO plugin is not mounted: NCCL falls back to plain TCP without a word")
        )
        settings = (
            {
                "NCCL_FASTRAK_CTRL_DEV": Setting("eth0", "control traffic of TCPXO"),
                "NCCL_FASTRAK_IFNAME": Setting(",".join(f"eth{idx}" for idx in range(1, 9)), "the eight data networks"),
            }
            if missing is None
            else {}
        )
        return Provider(
            "gke-tcpxo", "GKE A3 Mega (TCPXO)", evidence, settings, "GKE manifests", missing, owns_hcas=True
        )
    if kind.startswith(("a3-highgpu", "a3-edgegpu")):
        missing = (
            None
            if TCPX_PLUGIN in markers
            else ("the TCPX plugin is not mounted: NCCL falls back to plain TCP without a word")
        )
        settings = (
            {
                "NCCL_GPUDIRECTTCPX_CTRL_DEV": Setting("eth0", "control traffic of TCPX"),
                "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME": Setting("eth1,eth2,eth3,eth4", "the four data networks"),
                "NCCL_ALGO": Setting("Ring", "TCPX supports rings only"),
                "NCCL_PROTO": Setting("Simple", "TCPX supports the Simple protocol only"),
                "NCCL_MAX_NCHANNELS": Setting("8", "as in Google's manifest"),
                "NCCL_MIN_NCHANNELS": Setting("8", "as in Google's manifest"),
            }
            if missing is None
            else {}
        )
        return Provider("gke-tcpx", "GKE A3 High (TCPX)", evidence, settings, "GKE manifests", missing, owns_hcas=True)
    return None


def _azure(facts: NodeFacts) -> Provider | None:
    kind = (instance_type(facts) or "").lower()
    is_azure = (facts.platform.vendor or "").startswith("Microsoft") or kind.startswith("standard_nd")
    ib = any(port.link_layer == "InfiniBand" for hca in facts.hcas for port in hca.ports)
    if not (is_azure and ib and facts.gpus):
        return None
    settings = {}
    missing = None
    if AZURE_TOPOLOGY in facts.platform.markers:
        settings["NCCL_TOPO_FILE"] = Setting(
            AZURE_TOPOLOGY, "the VM hides where GPUs and NICs sit; this file of the image tells NCCL"
        )
    elif len(facts.gpus) == 8 and "h100" in kind:
        missing = (
            f"no topology file at {AZURE_TOPOLOGY}: the VM hides the PCI tree, NCCL will pair GPUs and NICs at random"
        )
    return Provider(
        "azure-nd",
        "Azure ND (InfiniBand)",
        f"vendor Microsoft, InfiniBand in a VM{f', {kind}' if kind else ''}",
        settings,
        "Azure HPC images",
        missing,
    )


def _oci(facts: NodeFacts) -> Provider | None:
    evidence = _label(facts, "oci.oraclecloud.com/rdma.*")
    if evidence is None and facts.platform.asset_tag == "OracleCloud.com":
        evidence = "DMI asset tag OracleCloud.com"
    if (
        evidence is None
        and (facts.platform.vendor or "").startswith("Oracle")
        and "BM.GPU" in (facts.platform.product or "")
    ):
        evidence = f"product {facts.platform.product}"
    roce = any(port.link_layer == "Ethernet" for hca in facts.hcas for port in hca.ports)
    if evidence is None or not roce or not facts.gpus:
        return None
    rack = _rack_generation(facts)
    if rack is not None:
        settings = {
            "NCCL_MNNVL_ENABLE": Setting("1", f"{rack}: NVLink reaches beyond the node"),
            "NCCL_CUMEM_ENABLE": Setting("1", "multi-node NVLink needs cuMem"),
            "NCCL_NVLS_ENABLE": Setting("1", "as in OCI's manifests for this rack"),
        }
        if rack == "GB300":
            why = "the NICs hang off the CPU here; a nearer level silently switches GPUDirect off"
            settings["NCCL_NET_GDR_LEVEL"] = Setting("PHB", why)
            settings["NCCL_NET_GDR_C2C"] = Setting("1", why)
        return Provider("oci-rack", f"OCI {rack}", evidence, settings, "oracle-quickstart/oci-hpc")
    return Provider(
        "oci",
        "OCI bare-metal GPU (RoCE)",
        evidence,
        {
            "NCCL_IB_TC": Setting("41", "traffic class of OCI's RoCE fabric"),
            "NCCL_IB_SL": Setting("0", "service level of OCI's RoCE fabric"),
            "NCCL_IB_TIMEOUT": Setting("22", "OCI's fabric may pause longer than NCCL's default of 20 allows"),
            "NCCL_IGNORE_CPU_AFFINITY": Setting("1", "as in OCI's manifests; ranks are bound to their GPU's CPUs here"),
            "NCCL_CUMEM_ENABLE": Setting(
                None, "OCI's manifests set 0, which the fabric does not need and which costs NVLS"
            ),
        },
        "oracle-quickstart/oci-hpc",
    )


def _rack_generation(facts: NodeFacts) -> str | None:
    names = " ".join(gpu.name or "" for gpu in facts.gpus)
    return next((rack for rack in ("GB300", "GB200") if rack in names), None)


def _coreweave(facts: NodeFacts) -> Provider | None:
    evidence = _label(facts, "ib.coreweave.cloud/*", "*.coreweave.cloud/*")
    if evidence is None:
        return None
    settings = {
        "NCCL_NET_PLUGIN": Setting("none", "no SHARP without a reservation; keeps NCCL from loading its plugin")
    }
    roce = any(port.link_layer == "Ethernet" and port.state == "ACTIVE" for hca in facts.hcas for port in hca.ports)
    if _rack_generation(facts) == "GB300" and roce:
        settings |= {
            "NCCL_IB_ADDR_FAMILY": Setting("AF_INET6", "this RoCE fabric is IPv6"),
            "NCCL_IB_ADDR_RANGE": Setting("fd02::/16", "the addresses of the RoCE fabric"),
            "NCCL_IB_TC": Setting("96", "traffic class of the RoCE fabric"),
            "NCCL_IB_ADAPTIVE_ROUTING": Setting("1", "the RoCE fabric routes adaptively"),
        }
    return Provider("coreweave", "CoreWeave", evidence, settings, "CoreWeave manifests")


def _nebius_together(facts: NodeFacts) -> Provider | None:
    for pattern, id_, title in (
        ("nebius.com/*", "nebius", "Nebius"),
        ("node-role.together.ai/*", "together", "Together"),
    ):
        evidence = _label(facts, pattern)
        if evidence is not None:
            return Provider(id_, title, evidence, {}, f"{title} manifests, by SkyPilot 0.14")
    return None
