"""Checks of one node's GPUs: there, healthy, connected with each other."""

from __future__ import annotations

from launcher.fabric.findings import Finding, NodeCheck, Severity, View

NVIDIA = "0x10de"
GPU_CLASSES = ("0x0302", "0x0300")

BAD_THROTTLE = {
    "hw-slowdown": "the hardware slows itself down",
    "hw-thermal-slowdown": "too hot",
    "sw-thermal-slowdown": "too hot",
    "hw-power-brake": "the power supply asks for less",
}
"""Throttle reasons that are a fault; a power cap or an idle clock is not."""


def gpu_missing(view: View) -> list[Finding]:
    """GPUs that are on the bus but not in the driver's list: fallen off, or withheld from this container."""
    facts = view.facts
    known = {gpu.pci for gpu in facts.gpus}
    lost = [
        device.address
        for device in facts.pci
        if device.vendor == NVIDIA and (device.class_code or "").startswith(GPU_CLASSES) and device.address not in known
    ]
    if not lost or facts.platform.is_container is True:
        return []
    return [
        view.finding(
            "gpu-missing",
            Severity.ERROR,
            f"on the PCI bus, but not known to the driver: {', '.join(lost)}",
            "the GPU has fallen off the bus, or the driver refused it",
            "look for Xid 79 in the kernel log; reset the GPU or reboot the node",
        )
    ]


def gpu_health(view: View) -> list[Finding]:
    found = []
    for gpu in view.facts.gpus:
        if gpu.recovery_action not in (None, "none"):
            found.append(
                view.finding(
                    "gpu-recovery",
                    Severity.ERROR,
                    f"GPU {gpu.index}: NVML asks for {gpu.recovery_action}",
                    "the GPU is not healthy; work on it fails or hangs",
                    f"drain the node, then: {gpu.recovery_action}",
                )
            )
        if gpu.is_remap_failed:
            found.append(
                view.finding(
                    "gpu-memory",
                    Severity.ERROR,
                    f"GPU {gpu.index}: row remapping failed",
                    "its memory has more bad rows than it can replace",
                    "have the GPU replaced",
                )
            )
        elif gpu.is_remap_pending:
            found.append(
                view.finding(
                    "gpu-memory",
                    Severity.WARNING,
                    f"GPU {gpu.index}: row remapping is pending",
                    "bad memory rows stay in use until the GPU is reset; expect ECC errors (Xid 94, 95)",
                    "reset the GPU (`nvidia-smi -r`) when the node is idle",
                )
            )
        if gpu.num_ecc_uncorrected:
            found.append(
                view.finding(
                    "gpu-ecc",
                    Severity.WARNING,
                    f"GPU {gpu.index}: {gpu.num_ecc_uncorrected} uncorrected ECC errors since the driver was loaded",
                    "processes that used the bad memory were ended; more may follow",
                    "reset the GPU, and watch whether the count grows",
                )
            )
        bad = [reason for reason in gpu.throttle_reasons or () if reason in BAD_THROTTLE]
        if bad:
            found.append(
                view.finding(
                    "gpu-throttled",
                    Severity.WARNING,
                    f"GPU {gpu.index}: {', '.join(f'{reason} ({BAD_THROTTLE[reason]})' for reason in bad)}",
                    "one slow rank slows every rank",
                    "check cooling and power of the node",
                )
            )
        if gpu.is_mig and len(view.facts.gpus) > 1:
            found.append(
                view.finding(
                    "gpu-mig",
                    Severity.WARNING,
                    f"GPU {gpu.index} is split (MIG)",
                    "NCCL does not connect MIG slices of one machine with each other",
                    "switch MIG off for training over several GPUs (`nvidia-smi -mig 0`)",
                )
            )
    return found


XIDS = {
    46: "the GPU stopped processing",
    48: "uncorrectable memory error",
    54: "auxiliary power is not connected",
    61: "the GPU's microcontroller broke down",
    62: "the GPU's microcontroller halted",
    64: "a bad memory row could not be remapped",
    74: "NVLink error",
    79: "the GPU has fallen off the bus",
    95: "uncontained memory error",
    119: "the GPU's system processor does not answer",
    120: "the GPU's system processor broke down",
    136: "the NVLink of an NVSwitch could not be trained",
    140: "unrecovered memory error",
    **dict.fromkeys(range(144, 151), "NVLink error"),
}
"""Xids that say something of the GPU or the node (NVIDIA's catalogue); others are faults of programs, or follow from these."""


def gpu_xid(view: View) -> list[Finding]:
    """Errors of the hardware that the kernel's log remembers since boot; a reset since then does not take them out of it."""
    by_code: dict[int, list[str]] = {}
    numbers = {gpu.pci: gpu.index for gpu in view.facts.gpus if gpu.pci is not None}
    for xid in view.facts.xids or ():
        if xid.code in XIDS:
            known = numbers.get(xid.pci) if xid.pci is not None else None
            by_code.setdefault(xid.code, []).append(f"GPU {known}" if known is not None else xid.pci or "a GPU")
    return [
        view.finding(
            "gpu-xid",
            Severity.WARNING,
            f"the kernel's log has Xid {code} ({XIDS[code]}) {len(where)} times since boot: {', '.join(dict.fromkeys(where))}",
            "work on that GPU failed, and may again",
            "if it was not reset since: drain the node, reset the GPU or reboot; if it comes again, have it replaced",
        )
        for code, where in sorted(by_code.items())
    ]


def nvlink(view: View) -> list[Finding]:
    gpus, found = view.facts.gpus, []
    most = max((gpu.num_nvlinks_active or 0 for gpu in gpus), default=0)
    for gpu in gpus:
        active = gpu.num_nvlinks_active
        if active is None or not most or active >= most:
            continue
        found.append(
            view.finding(
                "nvlink-down",
                Severity.ERROR,
                f"GPU {gpu.index}: {active} NVLinks up; its neighbours have {most}",
                "traffic between the GPUs of this node is slowed for all, or falls back to PCIe",
                "look for Xid 74 in the kernel log; reset the GPU or reboot the node",
            )
        )
    stuck = [gpu for gpu in gpus if gpu.fabric_state in ("not-started", "in-progress")]
    if stuck:
        found.append(
            view.finding(
                "fabric-manager",
                Severity.ERROR,
                f"NVSwitch fabric is {stuck[0].fabric_state} for GPU {', '.join(str(gpu.index) for gpu in stuck)}",
                "CUDA does not start on these GPUs (error 802, system not yet initialized)",
                "start the fabric manager, in the driver's version: systemctl status nvidia-fabricmanager",
            )
        )
    return found


CHECKS: tuple[NodeCheck, ...] = (gpu_missing, gpu_health, gpu_xid, nvlink)
