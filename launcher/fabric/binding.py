"""Which CPUs and which memory node each rank of a node shall use.

A rank is best bound to the CPUs beside its GPU: torch measured 1–10 %. Ranks of one memory node share its CPUs; they are not
split further, because DataLoader workers inherit the binding and would starve on a rank's share. A binding that the facts do
not support is not made, and says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from launcher.fabric.facts import NodeFacts
from launcher.fabric.topology import nearest_cpus, numa_of_gpu

Bind = Literal["auto", "numa", "none"]


@dataclass(frozen=True)
class Binding:
    """What to bind one rank to; cpus None: leave it where the scheduler puts it."""

    local_rank: int
    gpu_index: int | None
    cpus: tuple[int, ...] | None
    memory_node: int | None
    reason: str

    def __str__(self) -> str:
        """
        >>> str(Binding(0, 0, (0, 1, 2), 0, "GPU 0 is on memory node 0"))
        'CPUs 0-2, memory of node 0 preferred: GPU 0 is on memory node 0'
        """
        if self.cpus is None:
            return f"not bound: {self.reason}"
        memory = "" if self.memory_node is None else f", memory of node {self.memory_node} preferred"
        return f"CPUs {cpu_list(self.cpus)}{memory}: {self.reason}"


def visible_gpus(facts: NodeFacts, env: Mapping[str, str]) -> tuple[int, ...]:
    """GPU indices in the order in which CUDA will number them in a rank.

    CUDA_VISIBLE_DEVICES is followed, by index or by UUID prefix; as in CUDA, the first name that fits nothing ends the list.
    """
    value = env.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return tuple(gpu.index for gpu in facts.gpus)
    indices = {gpu.index for gpu in facts.gpus}
    found: list[int] = []
    for part in (item.strip() for item in value.split(",")):
        match = [gpu.index for gpu in facts.gpus if gpu.uuid is not None and part and gpu.uuid.startswith(part)]
        if part.isdigit() and int(part) in indices:
            found.append(int(part))
        elif len(match) == 1:
            found.append(match[0])
        else:
            break
    return tuple(found)


def bindings(facts: NodeFacts, local_world_size: int, bind: Bind, env: Mapping[str, str]) -> tuple[Binding, ...]:
    """One binding for each local rank; rank i uses the i-th visible GPU."""
    gpus = visible_gpus(facts, env)
    if bind == "none":
        return _unbound(local_world_size, gpus, "binding is switched off (--bind none)")
    num_nodes = len(facts.cpus.numa)
    if bind == "numa" and not gpus:
        return _spread(facts, local_world_size)
    if bind == "auto":
        if not gpus:
            return _unbound(
                local_world_size, gpus, "no GPU here; --bind numa spreads ranks on CPUs over the memory nodes"
            )
        if num_nodes == 1:
            return _unbound(local_world_size, gpus, "the machine has one memory node")
        if num_nodes == 0:
            return _unbound(local_world_size, gpus, "the memory nodes of this machine are not known")
        if len(gpus) < local_world_size:
            return _unbound(
                local_world_size,
                gpus,
                f"{local_world_size} ranks share {len(gpus)} GPUs; there is no nearest node per rank",
            )
    found = []
    for local_rank in range(local_world_size):
        gpu_index = gpus[local_rank] if local_rank < len(gpus) else None
        found.append(_bind_one(facts, local_rank, gpu_index))
    if bind == "auto" and any(binding.cpus is None for binding in found):
        # Half a binding would crowd some ranks and not the others; all or none.
        why = next(binding.reason for binding in found if binding.cpus is None)
        return _unbound(local_world_size, gpus, f"not every rank can be bound: {why}")
    return tuple(found)


def _spread(facts: NodeFacts, local_world_size: int) -> tuple[Binding, ...]:
    """Ranks without GPUs: neighbours share a memory node, each node gets as many as the others (one more at most)."""
    allowed = None if facts.cpus.allowed is None else set(facts.cpus.allowed)
    usable = [
        (node.id, cpus)
        for node in facts.cpus.numa
        if (cpus := tuple(cpu for cpu in node.cpus or () if allowed is None or cpu in allowed))
    ]
    if not usable:
        return _unbound(local_world_size, (), "the memory nodes of this machine are not known")
    found = []
    for local_rank in range(local_world_size):
        node, cpus = usable[local_rank * len(usable) // local_world_size]
        reason = f"--bind numa: rank {local_rank} of {local_world_size} over {len(usable)} memory nodes"
        found.append(Binding(local_rank, None, cpus, node, reason))
    return tuple(found)


def _bind_one(facts: NodeFacts, local_rank: int, gpu_index: int | None) -> Binding:
    if gpu_index is None:
        return Binding(local_rank, None, None, None, "no GPU for this rank")
    node = numa_of_gpu(facts, gpu_index)
    if node is None:
        return Binding(local_rank, gpu_index, None, None, f"the memory node of GPU {gpu_index} is not known")
    cpus = nearest_cpus(facts, gpu_index)
    if cpus is None:
        return Binding(
            local_rank, gpu_index, None, None, f"no CPU of memory node {node} (beside GPU {gpu_index}) may be used here"
        )
    return Binding(local_rank, gpu_index, cpus, node, f"GPU {gpu_index} is on memory node {node}")


def _unbound(local_world_size: int, gpus: tuple[int, ...], reason: str) -> tuple[Binding, ...]:
    return tuple(
        Binding(rank, gpus[rank] if rank < len(gpus) else None, None, None, reason) for rank in range(local_world_size)
    )


def cpu_list(cpus: tuple[int, ...]) -> str:
    """CPUs in the kernel's own notation.

    >>> cpu_list((0, 1, 2, 8, 10, 11))
    '0-2,8,10-11'
    """
    parts: list[str] = []
    ordered = sorted(cpus)
    idx = 0
    while idx < len(ordered):
        end = idx
        while end + 1 < len(ordered) and ordered[end + 1] == ordered[end] + 1:
            end += 1
        parts.append(str(ordered[idx]) if idx == end else f"{ordered[idx]}-{ordered[end]}")
        idx = end + 1
    return ",".join(parts)


def parse_cpu_list(text: str) -> tuple[int, ...] | None:
    """The kernel's notation read back; None for anything else.

    >>> parse_cpu_list("0-2,8"), parse_cpu_list("x")
    ((0, 1, 2, 8), None)
    """
    found: list[int] = []
    for part in text.strip().split(","):
        if not part:
            continue
        first, dash, last = part.partition("-")
        if not _is_number(first) or (dash and not _is_number(last)):
            return None
        low, high = int(first), int(last or first)
        if high < low or high - low > 65536:
            return None
        found.extend(range(low, high + 1))
    return tuple(found)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 9
