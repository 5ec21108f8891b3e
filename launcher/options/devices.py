"""How many GPUs and CPUs this machine has for us, without importing torch (which costs a second).

`visible_count` is pure; `count_gpus` asks NVML, `count_cpus` the kernel.
"""

from __future__ import annotations

import os
from collections.abc import Sequence


def visible_count(uuids: Sequence[str], visible: str | None) -> int:
    """How many of the GPUs CUDA would show under this CUDA_VISIBLE_DEVICES (None: unset).

    CUDA's rule: indices or beginnings of UUIDs; the list ends at the first that is not there; a repeated one hides all.

    >>> visible_count(["GPU-aa", "GPU-bb"], None), visible_count(["GPU-aa", "GPU-bb"], "1,7,0"), visible_count(["GPU-aa"], "")
    (2, 1, 0)
    """
    if visible is None:
        return len(uuids)
    seen: list[str] = []
    for part in (item.strip() for item in visible.split(",")):
        if part.isdigit():
            found = [uuids[int(part)]] if int(part) < len(uuids) else []
        else:
            found = [uuid for uuid in uuids if part and uuid.startswith(part)]
            if part.startswith("MIG-"):
                found = [part]
        if len(found) != 1:
            break
        seen += found
    return len(seen) if len(set(seen)) == len(seen) else 0


def count_gpus(visible: str | None) -> int:
    """NVIDIA GPUs of this machine under this CUDA_VISIBLE_DEVICES; 0 without a driver."""
    try:
        import pynvml
    except ImportError:
        return 0
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return 0
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(idx) for idx in range(pynvml.nvmlDeviceGetCount())]
        return visible_count([_text(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles], visible)
    finally:
        pynvml.nvmlShutdown()


def count_cpus() -> int:
    """CPUs that this process may run on (torchrun's count)."""
    return len(os.sched_getaffinity(0))


def _text(value: str | bytes) -> str:
    """Old releases of pynvml answer bytes."""
    return value.decode() if isinstance(value, bytes) else value
