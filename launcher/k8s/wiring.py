"""What a fabric adds to a worker's pod. Pure data; `fabric` and `fabric_gke` fill it in, `pods` puts it into the template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Wiring:
    """What the worker's Ray container and its pod get."""

    resources: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    volumes: tuple[Mapping[str, Any], ...] = ()
    mounts: tuple[Mapping[str, Any], ...] = ()
    locks_memory: bool = False
    """RDMA registers memory: capability IPC_LOCK, which the kernel grants to root only."""
    privileged: bool = False
    host_network: bool = False
    setup: str | None = None
    """Shell words that run before `ray start` in the same shell, so that Ray and the ranks inherit what they export."""
    daemons: tuple[Mapping[str, Any], ...] = ()
    """Native sidecars that move the bytes; they need the pod's network, and no Ray."""
    note: str = ""
