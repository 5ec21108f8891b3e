"""Checks of one node's limits and software: memory, shared memory, locked memory, ports, known bad versions."""

from __future__ import annotations

from launcher.fabric.findings import Finding, NodeCheck, Severity, View
from launcher.fabric.nccl import parse_version

MIB = 1 << 20
GIB = 1 << 30

SHM_PER_CHANNEL = 10 * MIB
"""What NCCL takes of /dev/shm for each ordered pair of ranks on a node (about; measured by others)."""

SHM_PER_RANK = 64 * MIB
"""What a DataLoader with a few workers has in flight in /dev/shm, at least."""

CONTAINER_SHM = 64 * MIB
"""What a container gets when nobody says otherwise."""

MEMLOCK_ENOUGH = GIB
"""Locked memory with which NCCL's buffers for a node fit."""

BAD_NCCL = ((2, 28, 3), (2, 28, 8))
"""NCCL versions whose RAS thread breaks a restart within the process (NVRx)."""


def shared_memory(view: View) -> list[Finding]:
    memory = view.facts.memory
    ranks = max(1, len(view.facts.gpus))
    if memory.dev_shm_bytes is None:
        return []
    needed = SHM_PER_CHANNEL * ranks * (ranks - 1) + SHM_PER_RANK * ranks
    total, free = memory.dev_shm_bytes, memory.dev_shm_free_bytes
    if total <= CONTAINER_SHM or (total < needed and ranks > 1):
        is_fatal = ranks > 1
        return [
            view.finding(
                "shm-small",
                Severity.ERROR if is_fatal else Severity.WARNING,
                f"/dev/shm has {total // MIB} MiB; {ranks} ranks and their DataLoaders need about {needed // MIB} MiB",
                'DataLoader workers die with SIGBUS, NCCL with "no space left on device"',
                "mount a Memory emptyDir at /dev/shm (Kubernetes), or docker run --shm-size=32g",
            )
        ]
    if free is not None and free < needed and free < total // 4:
        return [
            view.finding(
                "shm-full",
                Severity.WARNING,
                f"/dev/shm has {free // MIB} MiB free of {total // MIB}; about {needed // MIB} MiB are needed",
                'DataLoader workers die with SIGBUS, NCCL with "no space left on device"',
                "remove what earlier jobs left in /dev/shm (ls -l /dev/shm)",
            )
        ]
    return []


def locked_memory(view: View) -> list[Finding]:
    facts = view.facts
    limit = facts.memory.memlock_bytes
    if view.env.hcas.transport == "socket" or limit is None or limit == "unlimited":
        return []
    if "ipc_lock" in (facts.platform.capabilities or ()) or limit >= MEMLOCK_ENOUGH:
        return []
    return [
        view.finding(
            "memlock-low",
            Severity.ERROR,
            f"ulimit -l is {limit // 1024} KiB and CAP_IPC_LOCK is not held",
            "RDMA memory cannot be registered: ibv_reg_mr or ibv_create_qp fails",
            "add the capability IPC_LOCK to the container, or ulimit -l unlimited (LimitMEMLOCK=infinity for systemd)",
        )
    ]


def memory_killer(view: View) -> list[Finding]:
    kills = view.facts.memory.num_oom_kills
    if not kills:
        return []
    return [
        view.finding(
            "memory-killer",
            Severity.WARNING,
            f"the kernel's memory killer has ended {kills} processes in this cgroup",
            "a rank that ends with exit code -9 was probably killed for memory",
            "raise the memory limit of the container, or use fewer DataLoader workers",
        )
    ]


def cpu_share(view: View) -> list[Finding]:
    cpus = view.facts.cpus
    ranks = max(1, len(view.facts.gpus))
    allowed = cpus.cgroup_cpus
    if allowed is None or allowed == "unlimited" or allowed >= ranks:
        return []
    return [
        view.finding(
            "cpu-share-small",
            Severity.WARNING,
            f"the cgroup allows {allowed:g} CPUs for {ranks} ranks",
            "ranks are stopped by the scheduler in every period; collectives wait for the one that is stopped",
            "raise the CPU limit of the container to several CPUs per rank",
        )
    ]


def binding_impossible(view: View) -> list[Finding]:
    if len(view.facts.cpus.numa) < 2 or not view.facts.gpus:
        return []
    why = next((binding.reason for binding in view.env.bindings if binding.cpus is None), None)
    if why is None or "switched off" in why or "share" in why:
        return []
    return [
        view.finding(
            "binding-impossible",
            Severity.INFO,
            why,
            "ranks are not bound to the CPUs beside their GPU",
            "give the container CPUs of every memory node (static CPU manager with topology hints)",
        )
    ]


def port_range(view: View) -> list[Finding]:
    ports = view.facts.platform.port_range
    if ports is None or ports[1] - ports[0] + 1 >= 1000 or not view.is_multi_node:
        return []
    return [
        view.finding(
            "port-range-narrow",
            Severity.WARNING,
            f"ip_local_port_range is {ports[0]}–{ports[1]}",
            "NCCL and gloo take an ephemeral port for each connection; large gangs run out of them",
            "widen net.ipv4.ip_local_port_range (and the firewall rule that covers it)",
        )
    ]


def bad_versions(view: View) -> list[Finding]:
    version = parse_version(view.facts.software.nccl)
    if version is None or not BAD_NCCL[0] <= version <= BAD_NCCL[1]:
        return []
    return [
        view.finding(
            "nccl-bad-version",
            Severity.WARNING,
            f"NCCL {view.facts.software.nccl}",
            "its RAS thread breaks a restart within the process (2.28.3 to 2.28.8)",
            "use another NCCL, or set NCCL_RAS_ENABLE=0",
        )
    ]


def unread(view: View) -> list[Finding]:
    if not view.facts.unread:
        return []
    shown = "; ".join(view.facts.unread[:6])
    more = f" and {len(view.facts.unread) - 6} more" if len(view.facts.unread) > 6 else ""
    return [
        view.finding(
            "facts-incomplete",
            Severity.INFO,
            f"{shown}{more}",
            "what could not be read is taken as unknown; checks that need it are silent",
            "run the doctor as root on the host to see everything",
        )
    ]


CHECKS: tuple[NodeCheck, ...] = (
    shared_memory,
    locked_memory,
    memory_killer,
    cpu_share,
    binding_impossible,
    port_range,
    bad_versions,
    unread,
)
