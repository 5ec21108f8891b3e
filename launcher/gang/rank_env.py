"""The environment of a rank: torchrun's variables as torchrun sets them, and ours; each with the reason why it is set.

Checked against torch's `elastic/agent/server/local_elastic_agent.py` and `distributed/run.py`. A variable that the user
has set is left alone wherever torchrun would leave it alone. NODE_RANK is not set, because torchrun does not: scripts
read GROUP_RANK, and a NODE_RANK that they find is the user's or the cluster's (docs/decisions/0011-launcher-node.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.errors import NodeError
from launcher.gang.events import AttemptPlan
from launcher.gang.masking import masked
from launcher.gang.world import Member
from launcher.spec import JobSpec


@dataclass(frozen=True)
class Setting:
    """One variable that the launcher sets."""

    name: str
    value: str
    reason: str
    source: str = ""
    """Where the rule comes from (a guide, a manifest), for what is not our own."""


@dataclass(frozen=True)
class Kept:
    """A variable that the user has set to something else than we would have; his value stays."""

    name: str
    value: str
    ours: str
    """What we would have set; empty: nothing."""
    reason: str
    source: str = ""


@dataclass(frozen=True)
class NodeAdvice:
    """What a node's hardware asks for, in plain values: whoever looks at hardware (launcher.fabric) is not known here."""

    settings: tuple[Setting, ...] = ()
    """For each rank of the node, where neither the user nor the gang has a value."""
    kept: tuple[Kept, ...] = ()
    bindings: tuple[str, ...] = ()
    """By local rank: what it is bound to, or why not, in a sentence."""


PER_RANK = (
    "RANK",
    "LOCAL_RANK",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_NAME",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES",
    "TORCH_NCCL_*",
    "TORCH_FR_*",
    "TORCHELASTIC_*",
    "RAILHEAD_*",
    "NCCL_*",
    "GLOO_*",
    "UCX_*",
    "FI_*",
)
"""Variables in which ranks may differ from each other and from one attempt to the next. Libraries read them when they are needed; a module
that reads one when it is imported cannot be imported for all ranks at once (`node/forkserver.py`)."""


def differing(env: Mapping[str, str], shared: Mapping[str, str]) -> tuple[str, ...]:
    """Variables of a rank that are not as in `shared`, and that may have been read there already.

    >>> differing({"RANK": "1", "LANG": "C", "NCCL_DEBUG": "INFO"}, {"LANG": "C.UTF-8"})
    ('LANG',)
    """
    names = {name for name in {*env, *shared} if env.get(name) != shared.get(name)}
    return tuple(sorted(name for name in names if not is_per_rank(name)))


def is_per_rank(name: str) -> bool:
    return any(name.startswith(known[:-1]) if known.endswith("*") else name == known for known in PER_RANK)


@dataclass(frozen=True)
class RankPlaces:
    """Paths and sockets on this node that a rank is told of."""

    run_dir: str
    error_file: str
    cache_socket: str | None = None


NO_ADVICE = NodeAdvice()


def settings(
    spec: JobSpec,
    plan: AttemptPlan,
    member: Member,
    places: RankPlaces,
    base: Mapping[str, str],
    advice: NodeAdvice = NO_ADVICE,
) -> tuple[Setting, ...]:
    """What is set for this rank on top of `base`, its agent's environment (with `spec.env` already in it).

    What `advice` says comes last: it changes nothing that the user or the gang has set.

    Raises NodeError when `--virtual-local-rank` asks for a GPU that CUDA_VISIBLE_DEVICES does not have.
    """
    chosen = (
        *_places_in_the_gang(spec, plan, member),
        *_meeting_point(spec, plan, places),
        *defaults(member.node.num_ranks, base),
        *_devices(spec, member, base),
        *_ours(plan, places),
    )
    taken = {setting.name for setting in chosen}.union(base)
    return (*chosen, *(setting for setting in advice.settings if setting.name not in taken))


def apply(chosen: Sequence[Setting], base: Mapping[str, str]) -> dict[str, str]:
    """`base` with the settings in it: the environment that the rank is born with."""
    return {**base, **{setting.name: setting.value for setting in chosen}}


def account(
    chosen: Sequence[Setting], base: Mapping[str, str], advice: NodeAdvice = NO_ADVICE, local_rank: int = 0
) -> dict[str, object]:
    """For people who ask "why is this set?": every setting with its reason, what was inherited (secrets masked), where a value of theirs
    differs from ours, and what the rank is bound to."""
    return {
        "set": [_told(setting.name, setting.value, setting.reason, setting.source) for setting in chosen],
        "yours": [
            _told(kept.name, kept.value, kept.reason, kept.source, ours=kept.ours or None) for kept in advice.kept
        ],
        "binding": advice.bindings[local_rank] if local_rank < len(advice.bindings) else "not bound",
        "inherited": masked({name: value for name, value in base.items() if name not in {s.name for s in chosen}}),
    }


def _told(name: str, value: str, reason: str, source: str, **more: object) -> dict[str, object]:
    return {"name": name, "value": value, "reason": reason, **({"source": source} if source else {}), **more}


def _places_in_the_gang(spec: JobSpec, plan: AttemptPlan, member: Member) -> tuple[Setting, ...]:
    world_size = str(plan.world.world_size)
    reason = f"rank {member.rank} is number {member.local_rank} on node {member.node_rank} ({member.node.hostname})"
    return (
        Setting("RANK", str(member.rank), reason),
        Setting("GROUP_RANK", str(member.node_rank), reason),
        Setting("ROLE_RANK", str(member.rank), "one role: the same as RANK"),
        Setting("ROLE_NAME", spec.role, "--role"),
        Setting("LOCAL_WORLD_SIZE", str(member.node.num_ranks), "ranks on this node"),
        Setting("WORLD_SIZE", world_size, "ranks of all nodes"),
        Setting("GROUP_WORLD_SIZE", str(len(plan.world.nodes)), "nodes"),
        Setting("ROLE_WORLD_SIZE", world_size, "one role: the same as WORLD_SIZE"),
    )


def _meeting_point(spec: JobSpec, plan: AttemptPlan, places: RankPlaces) -> tuple[Setting, ...]:
    return (
        Setting("MASTER_ADDR", plan.store.host, "where node rank 0 hosts this attempt's store"),
        Setting("MASTER_PORT", str(plan.store.port), "where node rank 0 hosts this attempt's store"),
        Setting("TORCHELASTIC_RESTART_COUNT", str(plan.attempt), "restarts so far"),
        Setting("TORCHELASTIC_MAX_RESTARTS", str(spec.restarts.max_restarts), "--max-restarts"),
        Setting("TORCHELASTIC_RUN_ID", spec.run_id, "--rdzv-id"),
        Setting(
            "TORCHELASTIC_USE_AGENT_STORE", "True", "the store is ours: init_process_group connects, it hosts nothing"
        ),
        Setting("TORCHELASTIC_ERROR_FILE", places.error_file, "where the rank writes the exception that ends it"),
    )


def defaults(num_ranks: int, base: Mapping[str, str]) -> tuple[Setting, ...]:
    """What every rank of a node with so many gets if the user has not set it."""
    found = []
    if "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in base:
        found.append(Setting("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "as torchrun: a failed collective ends the rank"))
    if "OMP_NUM_THREADS" not in base and num_ranks > 1:
        found.append(
            Setting("OMP_NUM_THREADS", "1", "as torchrun: several ranks share the node's cores; set it to tune")
        )
    return tuple(found)


def _devices(spec: JobSpec, member: Member, base: Mapping[str, str]) -> tuple[Setting, ...]:
    if not spec.virtual_local_rank:
        return (Setting("LOCAL_RANK", str(member.local_rank), "index on this node"),)
    visible = base.get("CUDA_VISIBLE_DEVICES")
    devices = [str(member.local_rank)] if visible is None else [name.strip() for name in visible.split(",")]
    idx = 0 if visible is None else member.local_rank
    if idx >= len(devices):
        raise NodeError(
            f"local rank {member.local_rank} has no GPU: CUDA_VISIBLE_DEVICES={visible} names {len(devices)}",
            advice=f"ask for --nproc-per-node {len(devices)}, or leave out --virtual-local-rank",
        )
    return (
        Setting("LOCAL_RANK", "0", "--virtual-local-rank: each rank's GPU is its device 0"),
        Setting("CUDA_VISIBLE_DEVICES", devices[idx], "--virtual-local-rank: this rank's GPU alone"),
    )


def _ours(plan: AttemptPlan, places: RankPlaces) -> tuple[Setting, ...]:
    cache = [Setting("RAILHEAD_CACHE_SOCKET", places.cache_socket, "--cache-dir")] if places.cache_socket else []
    return (
        Setting("RAILHEAD_RUN_DIR", places.run_dir, "journal, logs and records of this job on this node"),
        Setting("RAILHEAD_ATTEMPT", str(plan.attempt), "attempt number, from 0"),
        *cache,
    )
