"""The probe on strange machines: whatever the files hold, facts come out, with more unknowns in them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.fabric.codec import from_json, to_json
from launcher.fabric.facts import NodeFacts
from launcher.fabric.findings import Severity, findings
from launcher.fabric.probe import probe
from launcher.fabric.probe_devices import acs_redirect, place_in_tree
from launcher.fabric.probe_gpus import bus_id, nvlink_domain, read_nvml
from launcher.fabric.probe_kernel_log import read_xids
from launcher.fabric.root import Root
from launcher.fabric.rules import GangRequest, environment
from tests.launcher.fabric.machines import facts_of, give_address, lay_out


def test_an_empty_root_gives_facts_without_a_single_claim(tmp_path: Path) -> None:
    """Unknown is None: not False, not 0."""
    facts = probe(tmp_path)
    assert facts == NodeFacts(hostname="unknown")
    assert probe(tmp_path / "does-not-exist") == facts


def test_the_running_machine_can_be_read() -> None:
    facts = probe()
    assert facts.hostname == os.uname().nodename
    assert facts.netdev_by_name["lo"].addresses[0] == "127.0.0.1/8"
    assert facts.cpus.allowed == tuple(sorted(os.sched_getaffinity(0)))
    assert facts.memory.dev_shm_bytes is not None
    assert facts.software.torch is not None
    assert not [text for text in facts.unread if "Error" in text]
    assert from_json(to_json(facts)) == facts


GARBAGE = [
    b"",
    b"\n",
    b"\x00\xff\xfe" * 9,
    b"-1\n",
    b"9" * 400,
    "٣ Gb/sec".encode(),
    b": ACTIVE",
    b"0x",
    b"a b c\n" * 50,
]


@pytest.mark.parametrize("seed", range(6))
def test_garbage_in_any_file_is_unknown_never_a_traceback(seed: int, tmp_path: Path) -> None:
    """A broken driver, a truncated copy: the doctor must still tell about the rest."""
    choice = random.Random(seed)
    layout = lay_out(choice.choice(["h20-roce-bond4", "gpuless-microvm", "epyc-4gpu-flat"]), tmp_path)
    give_address(layout, "eth0")
    for path in sorted(path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()):
        turn = choice.random()
        if turn < 0.4:
            path.write_bytes(choice.choice(GARBAGE))
        elif turn < 0.5:
            path.unlink()
        elif turn < 0.55:
            path.unlink()
            path.mkdir()
        elif turn < 0.6:
            path.unlink()
            path.symlink_to(path.name)
    facts = layout.probe(node_ip="10.20.30.7")
    assert not facts.unread
    environment([facts], GangRequest(num_nodes=2), {})
    findings([facts], request=GangRequest(num_nodes=2))
    assert from_json(to_json(facts)) == facts


def test_truncated_sysfs_loses_only_what_is_gone(tmp_path: Path) -> None:
    layout = lay_out("h20-roce-bond4", tmp_path)
    for path in sorted(tmp_path.glob("sys/class/infiniband/mlx5_bond_2/ports/1/*")):
        if path.is_file():
            path.unlink()
    facts = layout.probe()
    port = next(hca for hca in facts.hcas if hca.name == "mlx5_bond_2").ports[0]
    assert (port.state, port.rate_gbps, port.link_layer) == (None, None, None)
    assert len(port.gids) == 4
    (node,) = environment([facts], GangRequest(num_nodes=2), {})
    assert "mlx5_bond_2" not in node.hcas.hcas
    assert "unknown" in node.hcas.excluded["mlx5_bond_2"]


def test_garbage_in_a_gid_file_is_a_finding(tmp_path: Path) -> None:
    layout = lay_out("h20-roce-bond4", tmp_path)
    give_address(layout, "eth0")
    layout.write("sys/class/infiniband/mlx5_bond_1/ports/1/gids/3", "zz:zz\n")
    facts = layout.probe(node_ip="10.20.30.7")
    found = {finding.id: finding for finding in findings([facts], request=GangRequest(num_nodes=2))}
    assert "mlx5_bond_1" in found["gid-garbage"].evidence
    assert found["gid-none"].severity == Severity.ERROR


def test_a_thousand_virtual_functions_are_read_and_given_no_role(tmp_path: Path) -> None:
    """On an SR-IOV host every function shows up as an RDMA device; the page and the rules must stand it."""
    layout = lay_out("dgx-a100", tmp_path)
    folder = layout.pci_folder("mlx5_0").rsplit("/", 1)[0]
    for idx in range(1000):
        address = f"00f0:{idx // 250:02x}:{idx % 250 // 8:02x}.{idx % 8}"
        function = f"{folder}/{address}"
        for name, text in (("vendor", "0x15b3"), ("class", "0x020700"), ("numa_node", "3")):
            layout.write(f"{function}/{name}", text)
        (layout.root / function / "physfn").symlink_to("../0000:0c:00.0")
        for target, link in (
            (function, f"sys/bus/pci/devices/{address}"),
            (function, f"sys/class/infiniband/vf{idx}/device"),
        ):
            path = layout.root / link
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(layout.root / target)
        port = f"sys/class/infiniband/vf{idx}/ports/1"
        layout.write(f"{port}/state", "4: ACTIVE")
        layout.write(f"{port}/link_layer", "InfiniBand")
        layout.write(f"{port}/rate", "200 Gb/sec (4X HDR)")
    # Links out of the copy, to absolute paths, must not be followed into this machine.
    facts = layout.probe()
    assert len(facts.hcas) == 1012
    (node,) = environment([facts], GangRequest(num_nodes=2), {})
    assert not [name for name in node.hcas.hcas if name.startswith("vf")]
    assert set(node.hcas.hcas) == {"mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3", "mlx5_6", "mlx5_7", "mlx5_8", "mlx5_9"}


def test_links_do_not_lead_out_of_the_root(tmp_path: Path) -> None:
    """A copy with absolute links must tell about the copied machine, not about this one."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a/b").symlink_to("/etc/hostname")
    (tmp_path / "loop").symlink_to("loop")
    assert Root(tmp_path).resolved("a/b") is None
    assert Root(tmp_path).resolved("loop") is None
    assert Root(tmp_path).resolved("a/../a") == "a"


def test_minus_one_is_unknown(tmp_path: Path) -> None:
    """numa_node and speed read -1 on small VMs."""
    facts = facts_of("gpuless-microvm", tmp_path)
    assert {device.numa for device in facts.pci} == {None}
    assert facts.netdev_by_name["eth0"].speed_mbps is None


@given(st.text(max_size=60))
def test_any_path_has_a_place_or_none(text: str) -> None:
    root, path, address = place_in_tree(text)
    assert (root is None) == (path is None)
    assert address is None or ":" in address


def _config(control: int, *, capability: int = 0x0D, length: int = 4096) -> bytes:
    config = bytearray(length)
    # An AER capability first, then the one asked for.
    config[0x100:0x104] = (0x0001 | 1 << 16 | 0x148 << 20).to_bytes(4, "little")
    config[0x148:0x14C] = (capability | 1 << 16).to_bytes(4, "little")
    config[0x14E:0x150] = control.to_bytes(2, "little")
    return bytes(config)


def test_acs_is_read_from_the_extended_configuration_space() -> None:
    assert acs_redirect(_config(0x0C)) is True
    assert acs_redirect(_config(0x01)) is False, "source validation alone redirects nothing"
    assert acs_redirect(_config(0x0C, capability=0x0E)) is False
    assert acs_redirect(_config(0x0C)[:64]) is None, "without root the kernel shows 64 bytes"
    assert acs_redirect(None) is None


@given(st.binary(max_size=600))
def test_any_configuration_space_has_an_answer(config: bytes) -> None:
    assert acs_redirect(config) in (True, False, None)


def test_limits_are_read(tmp_path: Path) -> None:
    layout = lay_out("gpuless-microvm", tmp_path)
    layout.write(
        "proc/self/limits", "Limit  Soft Limit  Hard Limit  Units\nMax locked memory   65536   65536   bytes\n"
    )
    layout.write("proc/self/cgroup", "0::/kubepods/pod1/c\n")
    layout.write("sys/fs/cgroup/kubepods/pod1/cpu.max", "250000 100000\n")
    layout.write("sys/fs/cgroup/kubepods/pod1/c/cpu.max", "max 100000\n")
    layout.write("sys/fs/cgroup/kubepods/pod1/c/memory.max", "1073741824\n")
    layout.write("sys/fs/cgroup/kubepods/pod1/c/memory.events", "low 0\noom 2\noom_kill 2\n")
    layout.write("proc/sys/net/ipv4/ip_local_port_range", "50000\t51000\n")
    layout.write("proc/meminfo", "MemTotal:  1000 kB\nHugePages_Free:  2560\n")
    facts = layout.probe()
    assert facts.memory.memlock_bytes == 65536
    assert facts.cpus.cgroup_cpus == 2.5
    assert facts.memory.cgroup_bytes == 1 << 30
    assert facts.memory.num_oom_kills == 2
    assert facts.memory.huge_pages_free == 2560
    assert facts.platform.port_range == (50000, 51000)
    assert facts.platform.capabilities == ("ipc_lock",)


def test_the_driver_and_its_peer_memory_are_read(tmp_path: Path) -> None:
    layout = lay_out("gpuless-microvm", tmp_path)
    layout.write(
        "proc/driver/nvidia/version",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs)\n",
    )
    layout.write("sys/module/nvidia_peermem/version", "570.86.15\n")
    layout.write("proc/modules", "nvidia_peermem 16384 0 - Live 0x0\nib_core 405504 1 rdma_cm, Live 0x0\n")
    layout.write("proc/cmdline", "quiet iommu=pt\n")
    facts = layout.probe()
    assert (facts.software.driver, facts.software.is_open_driver) == ("570.86.15", True)
    assert facts.platform.peer_memory == "nvidia_peermem"
    assert facts.platform.is_peer_memory_linked is False, "loaded before the RDMA stack: it does nothing"
    assert facts.platform.is_iommu_passthrough is True
    layout.write(
        "proc/modules", "nvidia_peermem 16384 0 - Live 0x0\nib_core 405504 2 rdma_cm,nvidia_peermem, Live 0x0\n"
    )
    assert layout.probe().platform.is_peer_memory_linked is True


def test_device_nodes_tell_whether_rdma_can_be_used_here(tmp_path: Path) -> None:
    """In a pod /sys shows the host's cards; without /dev/infiniband they are of no use."""
    layout = lay_out("dgx-a100", tmp_path)
    for idx in range(12):
        layout.write(f"sys/class/infiniband_verbs/uverbs{idx}/ibdev", f"mlx5_{idx}\n")
    layout.write("dev/infiniband/uverbs3", "")
    nodes = {hca.name: hca.has_device_node for hca in layout.probe().hcas}
    assert {name for name, has_node in nodes.items() if has_node} == {"mlx5_3"}


class FakeNvml:
    """Answers like NVML on a machine with two GPUs, of which the second has fallen off the bus."""

    NVML_NVLINK_MAX_LINKS = 18
    NVML_FI_DEV_GET_GPU_RECOVERY_ACTION = 230

    def __init__(self) -> None:
        self.is_open = False

    def nvmlInit(self) -> None:  # noqa: N802 (NVML's own names)
        self.is_open = True

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.is_open = False

    def __getattr__(self, name: str) -> Callable[..., Any]:
        answers: dict[str, Callable[..., Any]] = {
            "nvmlDeviceGetCount": lambda: 2,
            "nvmlSystemGetDriverVersion": lambda: b"570.86.15",
            "nvmlSystemGetCudaDriverVersion": lambda: 12080,
            "nvmlDeviceGetHandleByIndex": self._handle,
            "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId="00000000:0F:00.0"),
            "nvmlDeviceGetName": lambda handle: "NVIDIA H100",
            "nvmlDeviceGetUUID": lambda handle: "GPU-1",
            "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=80 << 30),
            "nvmlDeviceGetMigMode": lambda handle: [0, 0],
            "nvmlDeviceGetRemappedRows": lambda handle: (0, 0, 1, 0),
            "nvmlDeviceGetNvLinkState": self._link,
            "nvmlDeviceGetTotalEccErrors": lambda handle, kind, counter: 5,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: 0x44,
            "nvmlDeviceGetFieldValues": lambda handle, fields: [
                SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=1))
            ],
            "c_nvmlGpuFabricInfoV_t": lambda: SimpleNamespace(clusterUuid=bytes(range(16)), cliqueId=7, state=3),
            "nvmlDeviceGetGpuFabricInfoV": lambda handle, info: None,
        }
        if name not in answers:
            raise AttributeError(name)
        return answers[name]

    def _handle(self, index: int) -> str:
        if index == 1:
            raise RuntimeError("GPU is lost")
        return "handle"

    def _link(self, handle: str, link: int) -> int:
        if link >= 12:
            raise RuntimeError("Invalid Argument")
        return 0 if link == 3 else 1


def test_a_lost_gpu_does_not_hide_the_others() -> None:
    nvml = FakeNvml()
    reading = read_nvml(nvml)
    first, second = reading.gpus
    assert not nvml.is_open
    assert (reading.driver, reading.cuda) == ("570.86.15", "12.8")
    assert (first.pci, first.num_nvlinks, first.num_nvlinks_active) == ("0000:0f:00.0", 12, 11)
    assert (first.is_mig, first.is_remap_pending, first.is_remap_failed) == (False, True, False)
    assert first.throttle_reasons == ("sw-power-cap", "hw-thermal-slowdown")
    assert first.recovery_action == "gpu-reset"
    assert (first.fabric_state, first.clique_id) == ("completed", 7)
    assert first.cluster_uuid == "00010203-0405-0607-0809-0a0b0c0d0e0f"
    assert first.pcie_gen is None, "this driver does not answer that question"
    assert (second.index, second.name) == (1, None)
    assert "GPU 1" in reading.unread[0]


def test_the_nvlink_domain_is_one_question() -> None:
    """Asked before ranks have places, so that a rack's NVLink domain stays together where no label names it."""
    nvml = FakeNvml()
    assert nvlink_domain(nvml) == "00010203-0405-0607-0809-0a0b0c0d0e0f.7"
    assert not nvml.is_open

    class NoFabric(FakeNvml):
        def __getattr__(self, name: str) -> Callable[..., Any]:
            if "Fabric" in name:
                raise AttributeError(name)
            return super().__getattr__(name)

    assert nvlink_domain(NoFabric()) is None


KERNEL_LOG = """\
6,1,100,-;Linux version 6.8.0
3,2,200,-;NVRM: Xid (PCI:0000:0f:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus.
3,3,300,-;NVRM: Xid (PCI:0001:00:00): 31, pid=71, name=python, Ch 00000008, MMU Fault
3,4,400,-;NVRM: Xid (garbage): 74
"""


def test_what_the_kernels_log_says_of_gpus_is_a_fact_and_the_hardwares_errors_are_a_finding(tmp_path: Path) -> None:
    """Xid 79 in yesterday's log explains today's missing GPU; a program's own fault (31) accuses no hardware."""
    layout = lay_out("dgx-a100", tmp_path)
    layout.write("dev/kmsg", KERNEL_LOG)
    facts = layout.probe()
    assert facts.xids is not None
    assert [(xid.code, xid.pci) for xid in facts.xids] == [(79, "0000:0f:00.0"), (31, "0001:00:00.0"), (74, None)]
    found = [item.evidence for item in findings([facts], request=GangRequest()) if item.id == "gpu-xid"]
    assert len(found) == 2
    assert "Xid 74 (NVLink error) 1 times" in found[0]
    assert "Xid 79 (the GPU has fallen off the bus)" in found[1]
    assert found[1].endswith("GPU 1"), "that one, by its address"


def test_a_log_that_may_not_be_read_is_unknown(tmp_path: Path) -> None:
    assert lay_out("dgx-a100", tmp_path).probe().xids is None


def test_the_log_of_this_machine_is_read_without_waiting() -> None:
    """Reading it blocks at its end; a survey that waits for the next message of the kernel would wait for ever."""
    xids = read_xids(Root("/"))
    assert xids is None or all(xid.code > 0 for xid in xids)


def test_a_machine_without_nvml_says_why() -> None:
    class Broken:
        def nvmlInit(self) -> None:  # noqa: N802
            raise RuntimeError("Driver Not Loaded")

    assert read_nvml(Broken()).unread == ("nvml: Driver Not Loaded",)


@pytest.mark.parametrize(
    ("text", "address"), [("0000:0F:00.0", "0000:0f:00.0"), ("00010000:0F:00.0", "10000:0f:00.0"), ("x", None)]
)
def test_bus_ids_are_those_of_sysfs(text: str, address: str | None) -> None:
    assert bus_id(text) == address
