"""Reading the GPUs of the running machine through NVML (nvidia-ml-py), each question on its own.

An old driver, a GPU that has fallen off, or a value that this card does not have answers with an error: that value is then
unknown and the rest goes on.
"""

from __future__ import annotations

import ctypes
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from launcher.fabric.facts import Gpu, PciDevice

T = TypeVar("T")

RECOVERY_ACTIONS = {
    0: "none",
    1: "gpu-reset",
    2: "node-reboot",
    3: "drain-p2p",
    4: "drain-and-reset",
    5: "recover-imex-domain",
    6: "bus-reset",
    7: "system-reboot",
}
FABRIC_STATES = {0: "not-supported", 1: "not-started", 2: "in-progress", 3: "completed"}
THROTTLE_REASONS = {
    0x1: "idle",
    0x2: "clocks-setting",
    0x4: "sw-power-cap",
    0x8: "hw-slowdown",
    0x10: "sync-boost",
    0x20: "sw-thermal-slowdown",
    0x40: "hw-thermal-slowdown",
    0x80: "hw-power-brake",
    0x100: "display-clock",
}


@dataclass(frozen=True)
class NvmlReading:
    gpus: tuple[Gpu, ...]
    driver: str | None
    cuda: str | None
    unread: tuple[str, ...]
    """Why NVML gave nothing, if so."""


def read_nvml(nvml: Any = None) -> NvmlReading:
    """The GPUs that this process may see. `nvml`: the module to ask (a test passes another)."""
    if nvml is None:
        try:
            import pynvml
        except ImportError:
            return NvmlReading((), None, None, ("nvml: nvidia-ml-py is not installed",))
        nvml = pynvml
    try:
        nvml.nvmlInit()
    except Exception as error:  # NVML raises its own tree; whatever it is, there are no GPUs to see
        return NvmlReading((), None, None, (f"nvml: {error}",))
    try:
        return _read_all(nvml)
    finally:
        _ask(nvml, "nvmlShutdown")


def nvlink_domain(nvml: Any = None) -> str | None:
    """Which NVLink domain this node's GPUs are in, as the label `nvidia.com/gpu.clique` has it: CLUSTER.CLIQUE. One question, no survey."""
    try:
        if nvml is None:
            import pynvml

            nvml = pynvml
        nvml.nvmlInit()
    except Exception:  # no library, no driver, no GPU
        return None
    try:
        for index in range(_ask(nvml, "nvmlDeviceGetCount") or 0):
            handle = _ask(nvml, "nvmlDeviceGetHandleByIndex", index)
            _, cluster, clique = _fabric(nvml, handle) if handle is not None else (None, None, None)
            if cluster is not None:
                return f"{cluster}.{clique}"
        return None
    finally:
        _ask(nvml, "nvmlShutdown")


def _read_all(nvml: Any) -> NvmlReading:
    count = _ask(nvml, "nvmlDeviceGetCount")
    gpus, unread = [], []
    for index in range(count or 0):
        try:
            gpus.append(_read_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index))
        except Exception as error:  # a lost GPU must not hide the others
            unread.append(f"nvml: GPU {index}: {error}")
            gpus.append(Gpu(index))
    cuda = _ask(nvml, "nvmlSystemGetCudaDriverVersion")
    return NvmlReading(
        tuple(gpus),
        _text(_ask(nvml, "nvmlSystemGetDriverVersion")),
        f"{cuda // 1000}.{cuda % 1000 // 10}" if isinstance(cuda, int) else None,
        tuple(unread),
    )


def _read_gpu(nvml: Any, handle: Any, index: int) -> Gpu:
    pci = _ask(nvml, "nvmlDeviceGetPciInfo", handle)
    memory = _ask(nvml, "nvmlDeviceGetMemoryInfo", handle)
    mig = _ask(nvml, "nvmlDeviceGetMigMode", handle)
    remapped = _ask(nvml, "nvmlDeviceGetRemappedRows", handle)
    links, active = _nvlinks(nvml, handle)
    state, cluster, clique = _fabric(nvml, handle)
    reasons = _ask(nvml, "nvmlDeviceGetCurrentClocksEventReasons", handle)
    if reasons is None:
        reasons = _ask(nvml, "nvmlDeviceGetCurrentClocksThrottleReasons", handle)
    return Gpu(
        index=index,
        pci=bus_id(_text(getattr(pci, "busId", None))),
        uuid=_text(_ask(nvml, "nvmlDeviceGetUUID", handle)),
        name=_text(_ask(nvml, "nvmlDeviceGetName", handle)),
        memory_bytes=_integer(getattr(memory, "total", None)),
        is_mig=bool(mig[0]) if isinstance(mig, (list, tuple)) and mig else None,
        num_nvlinks=links,
        num_nvlinks_active=active,
        fabric_state=state,
        cluster_uuid=cluster,
        clique_id=clique,
        num_ecc_uncorrected=_integer(_ask(nvml, "nvmlDeviceGetTotalEccErrors", handle, 1, 0)),
        is_remap_pending=bool(remapped[2]) if isinstance(remapped, (list, tuple)) and len(remapped) == 4 else None,
        is_remap_failed=bool(remapped[3]) if isinstance(remapped, (list, tuple)) and len(remapped) == 4 else None,
        recovery_action=_recovery_action(nvml, handle),
        throttle_reasons=_reasons(reasons),
        pcie_gen=_integer(_ask(nvml, "nvmlDeviceGetCurrPcieLinkGeneration", handle)),
        max_pcie_gen=_integer(_ask(nvml, "nvmlDeviceGetMaxPcieLinkGeneration", handle)),
        pcie_width=_integer(_ask(nvml, "nvmlDeviceGetCurrPcieLinkWidth", handle)),
        max_pcie_width=_integer(_ask(nvml, "nvmlDeviceGetMaxPcieLinkWidth", handle)),
    )


def _nvlinks(nvml: Any, handle: Any) -> tuple[int | None, int | None]:
    states = []
    for link in range(getattr(nvml, "NVML_NVLINK_MAX_LINKS", 18)):
        state = _ask(nvml, "nvmlDeviceGetNvLinkState", handle, link)
        if state is None:
            # Numbers beyond the last link, and cards without NVLink, answer with an error.
            break
        states.append(state)
    return (len(states), sum(bool(state) for state in states)) if states else (None, None)


def _fabric(nvml: Any, handle: Any) -> tuple[str | None, str | None, int | None]:
    def query() -> Any:
        info = nvml.c_nvmlGpuFabricInfoV_t()
        nvml.nvmlDeviceGetGpuFabricInfoV(handle, ctypes.byref(info) if isinstance(info, ctypes.Structure) else info)
        return info

    info = _try(query)
    if info is None:
        return None, None, None
    raw = _try(lambda: bytes(info.clusterUuid))
    is_set = raw is not None and len(raw) == 16 and any(raw)
    cluster = str(uuid.UUID(bytes=raw)) if is_set and raw is not None else None
    clique = _integer(getattr(info, "cliqueId", None)) if is_set else None
    return FABRIC_STATES.get(_integer(getattr(info, "state", None)) or 0), cluster, clique


def _recovery_action(nvml: Any, handle: Any) -> str | None:
    field = getattr(nvml, "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION", None)
    if field is None:
        return None
    values = _ask(nvml, "nvmlDeviceGetFieldValues", handle, [field])
    value = values[0] if values is not None and len(values) == 1 else None
    if value is None or getattr(value, "nvmlReturn", 1) != 0:
        return None
    number = _integer(_try(lambda: value.value.uiVal))
    return None if number is None else RECOVERY_ACTIONS.get(number, f"unknown action {number}")


def _reasons(mask: Any) -> tuple[str, ...] | None:
    if not isinstance(mask, int):
        return None
    return tuple(name for bit, name in THROTTLE_REASONS.items() if mask & bit)


def gpus_on_the_bus(pci: tuple[PciDevice, ...]) -> tuple[Gpu, ...]:
    """GPUs as the PCI bus shows them, numbered in bus order, for a machine whose driver cannot be asked (a copy)."""
    found = [
        device
        for device in pci
        if device.vendor == "0x10de" and (device.class_code or "").startswith(("0x0302", "0x0300"))
    ]
    # Facts list PCI devices in the order of their addresses already.
    return tuple(Gpu(index, device.address) for index, device in enumerate(found))


def bus_id(text: str | None) -> str | None:
    """NVML's bus id (eight digits of domain, upper case) as sysfs writes it.

    >>> bus_id("00000000:0F:00.0")
    '0000:0f:00.0'
    """
    match = re.fullmatch(r"([0-9a-f]{4,8}):([0-9a-f]{2}:[0-9a-f]{2}\.[0-7])", (text or "").lower())
    if match is None:
        return None
    return f"{int(match.group(1), 16):04x}:{match.group(2)}"


def _ask(nvml: Any, question: str, *arguments: Any) -> Any:
    """One question to NVML; None if it has no answer, or if this nvidia-ml-py does not know the question."""
    return _try(lambda: getattr(nvml, question)(*arguments))


def _try(question: Callable[[], T]) -> T | None:
    try:
        return question()
    except Exception:  # NVMLError of many kinds, ctypes errors of old libraries
        return None


def _text(value: Any) -> str | None:
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    return value if isinstance(value, str) and value else None


def _integer(value: Any) -> int | None:
    return int(value) if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
