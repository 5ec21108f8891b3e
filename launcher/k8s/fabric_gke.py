"""Google's three fabrics for GPUs: RDMA (A3 Ultra, A4), TCPXO (A3 Mega) and TCPX (A3 High). Pure.

Values are those of GoogleCloudPlatform/container-engine-accelerators (gpudirect-tcpxo, gpudirect-tcpx) and of GKE's own guide. Each wants
one network of the node pool for each NIC, the GPU driver's libraries, which an installer puts NCCL's plugin beside, and its NCCL settings;
TCPX and TCPXO also a daemon in the pod that owns the NICs' receive queues.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.errors import SpecError
from launcher.k8s.options import KubeOptions
from launcher.k8s.wiring import Wiring

TCPXO_IMAGE = "us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpxo/tcpgpudmarxd-dev:v1.0.21"
TCPX_IMAGE = "us-docker.pkg.dev/gce-ai-infra/gpudirect-tcpx/tcpgpudmarxd-dev:v2.0.12"
"""They must fit the plugin that is installed on the nodes (the release notes pair them); --fabric-image names another."""
LIBRARIES = "/usr/local/nvidia/lib64"
SOCKETS = "/run/tcpx"
NUM_GPUS = 8
_HEALTH = "/run/health-check"
# Keeps what the user set: a sourced script assigns without looking.
_KEEP = 'own=$(export -p | grep " NCCL_" || true)'
_RESTORE = 'eval "$own"'

TCPX_SETTINGS: Mapping[str, str] = {
    "NCCL_SOCKET_IFNAME": "eth0",
    "NCCL_CROSS_NIC": "0",
    "NCCL_ALGO": "Ring",
    "NCCL_PROTO": "Simple",
    "NCCL_MIN_NCHANNELS": "8",
    "NCCL_MAX_NCHANNELS": "8",
    "NCCL_NSOCKS_PERTHREAD": "4",
    "NCCL_SOCKET_NTHREADS": "1",
    "NCCL_DYNAMIC_CHUNK_SIZE": "524288",
    "NCCL_P2P_NET_CHUNKSIZE": "524288",
    "NCCL_P2P_PCI_CHUNKSIZE": "524288",
    "NCCL_P2P_NVL_CHUNKSIZE": "1048576",
    "NCCL_BUFFSIZE": "4194304",
    "NCCL_NET_GDR_LEVEL": "PIX",
    "NCCL_P2P_PXN_LEVEL": "0",
    "NCCL_GPUDIRECTTCPX_SOCKET_IFNAME": "eth1,eth2,eth3,eth4",
    "NCCL_GPUDIRECTTCPX_CTRL_DEV": "eth0",
    "NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX": SOCKETS,
    "NCCL_GPUDIRECTTCPX_PROGRAM_FLOW_STEERING_WAIT_MICROS": "500000",
    "NCCL_GPUDIRECTTCPX_TX_BINDINGS": "eth1:8-21,112-125;eth2:8-21,112-125;eth3:60-73,164-177;eth4:60-73,164-177",
    "NCCL_GPUDIRECTTCPX_RX_BINDINGS": "eth1:22-35,126-139;eth2:22-35,126-139;eth3:74-87,178-191;eth4:74-87,178-191",
}
"""No script of the plugin's sets these. The bindings are the CPUs beside each NIC of an a3-highgpu-8g."""


def gke_rdma(kube: KubeOptions) -> Wiring:
    _whole_node("gke-rdma", kube)
    names = kube.fabric_networks or ("gvnic-1", *(f"rdma-{idx}" for idx in range(NUM_GPUS)))
    folders = {"gke-nvidia": ("nvidia", "/usr/local/nvidia"), "gke-gib": ("gib", "/usr/local/gib")}
    return Wiring(
        annotations=_interfaces("gke-rdma", names, NUM_GPUS + 1),
        volumes=tuple(_host(name, f"/home/kubernetes/bin/{folder}") for name, (folder, _) in folders.items()),
        mounts=tuple({"name": name, "mountPath": path} for name, (_, path) in folders.items()),
        setup=_sourced("/usr/local/gib/scripts/set_nccl_env.sh", f"{LIBRARIES}:/usr/local/gib/lib64"),
        locks_memory=True,
        note="the node pool must have the networks gvnic-1 and rdma-0 to rdma-7 and the NCCL gIB installer",
    )


def gke_tcpxo(kube: KubeOptions) -> Wiring:
    _whole_node("gke-tcpxo", kube)
    names = kube.fabric_networks or tuple(f"vpc{idx + 1}" for idx in range(NUM_GPUS))
    devices = [*_gpu_devices(), "/dev/dmabuf_import_helper"]
    daemon = {
        **_daemon("tcpxo-daemon", kube.fabric_image or TCPXO_IMAGE, ["NET_ADMIN", "NET_BIND_SERVICE"]),
        "command": ["/bin/sh", "-c"],
        "args": [
            "set -ex; chmod 755 /fts/entrypoint_rxdm_container.sh; "
            "exec /fts/entrypoint_rxdm_container.sh --num_hops=2 --num_nics=8 --uid= --alsologtostderr"
        ],
        "env": [
            {"name": "LD_LIBRARY_PATH", "value": LIBRARIES},
            {"name": "HEALTH_CHECK_LOG_FILE", "value": _HEALTH},
        ],
        # It takes about half a minute; on a node whose host side is broken the file never comes.
        "startupProbe": {"exec": {"command": ["cat", _HEALTH]}, "periodSeconds": 5, "failureThreshold": 24},
    }
    return Wiring(
        annotations={
            **_interfaces("gke-tcpxo", names, NUM_GPUS),
            "devices.gke.io/container.tcpxo-daemon": _injected(devices),
        },
        volumes=(*_daemon_volumes(), _host("aperture-devices", "/dev/aperture_devices")),
        mounts=(_LIBRARY_MOUNT, {"name": "aperture-devices", "mountPath": "/dev/aperture_devices"}),
        daemons=(daemon,),
        setup=_sourced(f"{LIBRARIES}/nccl-env-profile.sh", LIBRARIES)
        + " && export NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY=${NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY:-/dev/aperture_devices}",
        locks_memory=True,
        note="the node pool must have the networks vpc1 to vpc8 (--fabric-networks names others), the NCCL TCPXO installer and the NRI "
        "device injector",
    )


def gke_tcpx(kube: KubeOptions) -> Wiring:
    _whole_node("gke-tcpx", kube)
    names = kube.fabric_networks or tuple(f"vpc{idx + 1}" for idx in range(NUM_GPUS // 2))
    daemon = {
        **_daemon("tcpx-daemon", kube.fabric_image or TCPX_IMAGE, ["NET_ADMIN"]),
        "command": ["/tcpgpudmarxd/build/app/tcpgpudmarxd"],
        "args": [
            *("--gpu_nic_preset", "a3vm", "--gpu_shmem_type", "fd", "--uds_path", SOCKETS),
            *("--setup_param", '\\"--verbose 128 2 0 \\"'),
        ],
        "env": [{"name": "LD_LIBRARY_PATH", "value": LIBRARIES}],
    }
    sockets = {"name": "tcpx-sockets", "mountPath": SOCKETS}
    daemon["volumeMounts"] = [*daemon["volumeMounts"], sockets]
    exports = " ".join(f'{name}="${{{name}:-{value}}}"' for name, value in TCPX_SETTINGS.items())
    return Wiring(
        annotations={
            **_interfaces("gke-tcpx", names, NUM_GPUS // 2),
            "devices.gke.io/container.tcpx-daemon": _injected(_gpu_devices()),
        },
        volumes=(*_daemon_volumes(), {"name": "tcpx-sockets", "emptyDir": {}}),
        mounts=(_LIBRARY_MOUNT, sockets),
        daemons=(daemon,),
        setup=f'export {exports} LD_LIBRARY_PATH="{LIBRARIES}:$LD_LIBRARY_PATH"',
        locks_memory=True,
        note="the node pool must have the networks vpc1 to vpc4 (--fabric-networks names others), the NCCL TCPX installer and the NRI "
        "device injector",
    )


_LIBRARY_MOUNT = {"name": "gke-nvidia-lib64", "mountPath": LIBRARIES}


def _whole_node(fabric: str, kube: KubeOptions) -> None:
    if kube.gpus != NUM_GPUS:
        raise SpecError(
            f"--fabric {fabric} with --gpus {kube.gpus}: a pod takes the node's networks, and all {NUM_GPUS} of its GPUs with them",
            advice=f"give --gpus {NUM_GPUS}, or leave --fabric out for a part of one node",
        )


def _interfaces(fabric: str, networks: Sequence[str], count: int) -> dict[str, str]:
    if len(networks) != count:
        raise SpecError(
            f"--fabric {fabric} has {count} networks, one for each NIC, and --fabric-networks names {len(networks)}",
            advice="name them in the order of eth1, eth2, …; eth0 is the cluster's own",
        )
    pairs = [("eth0", "default"), *((f"eth{idx + 1}", name) for idx, name in enumerate(networks))]
    listed = json.dumps([{"interfaceName": name, "network": network} for name, network in pairs])
    return {"networking.gke.io/default-interface": "eth0", "networking.gke.io/interfaces": listed}


def _sourced(script: str, libraries: str) -> str:
    """Exports all that the script assigns, but what the user set. Without the script Ray does not start: NCCL would run over plain TCP, and
    nothing would say so."""
    missing = f'{{ echo "launcher: {script} is not on this node: is the NCCL plugin installed there?" >&2; exit 1; }}'
    return (
        f"{_KEEP} && export NCCL_LIB_DIR={LIBRARIES} && set -a && {{ source {script} || {missing}; }} && set +a && {_RESTORE} && "
        f'export LD_LIBRARY_PATH="{libraries}:$LD_LIBRARY_PATH"'
    )


def _gpu_devices() -> list[str]:
    return [*(f"/dev/nvidia{idx}" for idx in range(NUM_GPUS)), "/dev/nvidiactl", "/dev/nvidia-uvm"]


def _injected(devices: Sequence[str]) -> str:
    """For the NRI device injector: the daemon asks for no GPU, and sees all of them."""
    return "".join(f"- path: {device}\n" for device in devices)


def _daemon(name: str, image: str, capabilities: Sequence[str]) -> dict[str, Any]:
    """A native sidecar: as an ordinary container it would never let the pod complete."""
    return {
        "name": name,
        "image": image,
        "restartPolicy": "Always",
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        "volumeMounts": [
            _LIBRARY_MOUNT,
            {"name": "host-sys", "mountPath": "/hostsysfs"},
            {"name": "host-proc-sys", "mountPath": "/hostprocsysfs"},
        ],
        "securityContext": {"runAsUser": 0, "runAsNonRoot": False, "capabilities": {"add": list(capabilities)}},
    }


def _daemon_volumes() -> tuple[dict[str, Any], ...]:
    return (
        _host("gke-nvidia-lib64", "/home/kubernetes/bin/nvidia/lib64"),
        _host("host-sys", "/sys"),
        _host("host-proc-sys", "/proc/sys"),
    )


def _host(name: str, path: str) -> dict[str, Any]:
    return {"name": name, "hostPath": {"path": path, "type": "Directory"}}
