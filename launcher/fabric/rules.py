"""From the facts of all nodes of a gang to the environment of every rank, each value with its reason.

The guiding rule is to set as little as possible: where NCCL's own default is right nothing is set, and the page says so.
What is set is exact (a name, never a prefix) and per node, because hosts differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from launcher.fabric import cloud, nccl
from launcher.fabric.binding import Bind, Binding, bindings
from launcher.fabric.decision import Decision, UserEnv, of_each_node, variables, with_user
from launcher.fabric.facts import HcaPort, NodeFacts
from launcher.fabric.hcas import HcaChoice, choose
from launcher.fabric.interfaces import Interface, choose_interface, is_loopback

GUIDE = "NCCL 2.30 guide and source"
TORCHRUN = "torchrun's contract"
TORCH = "torch.distributed"

FLIGHT_RECORDER_ON_SINCE = (2, 13)
"""In this torch the flight recorder keeps 2000 entries by default (FlightRecorder.hpp); 2.6 kept none."""

FLIGHT_RECORDER_ENTRIES = 2000


@dataclass(frozen=True)
class GangRequest:
    """What of the job bears on the fabric."""

    local_world_size: int | None = None
    """Ranks on each node; None: one for each visible GPU, at least one."""
    num_nodes: int | None = None
    """Nodes of the gang; None: as many as there are facts. The doctor asks for 2 to show what a larger gang would get."""
    bind: Bind = "auto"
    is_rail_only: bool | None = None
    """The network has no path between rails (each NIC reaches only the NIC of its own number); None: not known."""
    flight_recorder_prefix: str | None = None
    """Path prefix for the collectives' trace that torch writes on a time-out; None: torch's own place."""
    nccl_log: str | None = None
    """Path of the ranks' NCCL logs in NCCL's pattern (%h host, %p process); None: nobody would read them."""


@dataclass(frozen=True)
class NodeEnvironment:
    """The decisions for one node and its ranks."""

    hostname: str
    node_rank: int
    decisions: tuple[Decision, ...]
    bindings: tuple[Binding, ...]
    hcas: HcaChoice
    interface: Interface
    provider: cloud.Provider | None

    def variables(self) -> dict[str, str]:
        """What to add to the environment of each rank of this node."""
        return variables(self.decisions)

    def decision(self, variable: str) -> Decision | None:
        return next((decision for decision in self.decisions if decision.variable == variable), None)


@dataclass(frozen=True)
class _Case:
    """What the rules of one node look at."""

    facts: NodeFacts
    request: GangRequest
    num_nodes: int
    num_ranks: int
    hcas: HcaChoice
    interface: Interface
    provider: cloud.Provider | None
    user_env: Mapping[str, str]


def environment(nodes: Sequence[NodeFacts], request: GangRequest, user_env: UserEnv) -> tuple[NodeEnvironment, ...]:
    """The environment of each node, in the order given (which is the order of node ranks)."""
    num_nodes = request.num_nodes if request.num_nodes is not None else len(nodes)
    return tuple(
        _of_node(node_rank, facts, request, num_nodes, env)
        for node_rank, (facts, env) in enumerate(zip(nodes, of_each_node(user_env, len(nodes)), strict=True))
    )


def _of_node(
    node_rank: int, facts: NodeFacts, request: GangRequest, num_nodes: int, user_env: Mapping[str, str]
) -> NodeEnvironment:
    num_ranks = request.local_world_size if request.local_world_size is not None else max(1, len(facts.gpus))
    hcas, interface, provider = choose(facts), choose_interface(facts), cloud.recognise(facts)
    case = _Case(facts, request, num_nodes, num_ranks, hcas, interface, provider, user_env)
    decided: dict[str, Decision] = {}
    for rule in _RULES:
        for decision in rule(case):
            # The provider's manifest comes first and knows more than a general rule.
            decided.setdefault(decision.variable, with_user(decision, user_env))
    return NodeEnvironment(
        facts.hostname,
        node_rank,
        tuple(decided.values()),
        bindings(facts, num_ranks, request.bind, user_env),
        case.hcas,
        case.interface,
        case.provider,
    )


def _interface(case: _Case) -> list[Decision]:
    names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
    if case.num_nodes == 1:
        why = "all ranks are on one node"
        return [Decision(name, None, why, GUIDE) for name in names]
    if is_loopback(case.facts.node_ip):
        why = f"the gang reaches this node at {case.facts.node_ip}: its nodes are one machine"
        return [Decision(name, None, why, GUIDE) for name in names]
    chosen = case.interface
    if chosen.name is None:
        return [Decision(name, None, chosen.reason, GUIDE) for name in names]
    by_default = nccl.default_interfaces(case.facts.netdevs)
    if not by_default:
        alone = ""
    elif by_default == [chosen.name]:
        alone = "; NCCL alone would take it too, but that depends on the names of whatever comes up later"
    else:
        alone = f"; NCCL alone would take {', '.join(by_default[:4])}"
    exact = nccl.names_value([chosen.name])
    return [
        Decision("NCCL_SOCKET_IFNAME", exact, f"{chosen.name} {chosen.reason}{alone}", GUIDE),
        Decision(
            "GLOO_SOCKET_IFNAME",
            chosen.name,
            f"{chosen.name} {chosen.reason}; gloo alone would take whatever the host's own name resolves to",
            TORCH,
        ),
    ]


def _ib_hca(case: _Case) -> list[Decision]:
    name = "NCCL_IB_HCA"
    if case.num_nodes == 1:
        return [Decision(name, None, "one node: no traffic leaves it", GUIDE)]
    choice = case.hcas
    if case.provider is not None and case.provider.owns_hcas:
        return [Decision(name, None, f"{case.provider.title}: its own plugin picks the devices", case.provider.source)]
    if choice.transport in ("efa", "socket"):
        return [Decision(name, None, choice.reason, GUIDE)]
    by_default = {(hca, port.port) for hca, port in nccl.usable_ports(case.facts)}
    chosen = {(port.hca, port.port) for port in choice.ports}
    if by_default == chosen and len(chosen) <= nccl.MAX_HCAS:
        why = f"NCCL takes all {len(chosen)} active ports by itself, and these are the right ones ({choice.reason})"
        return [Decision(name, None, why, GUIDE)]
    by_reason: dict[str, list[str]] = {}
    for hca, why in choice.excluded.items():
        by_reason.setdefault(why, []).append(hca)
    left_out = "; ".join(f"{', '.join(hcas)} ({why})" for why, hcas in by_reason.items())
    value = nccl.names_value([port.value(case.facts) for port in choice.ports])
    return [Decision(name, value, f"{choice.reason}. Left out: {left_out}", GUIDE)]


def _gid(case: _Case) -> list[Decision]:
    name = "NCCL_IB_GID_INDEX"
    choice = case.hcas
    if choice.transport == "infiniband":
        return [Decision(name, None, "InfiniBand: NCCL uses index 0", GUIDE)]
    if choice.transport != "roce" or case.num_nodes == 1:
        return []
    ports = _chosen_ports(case)
    indices = {label: nccl.gid_index(port) for label, port in ports.items() if port.gids}
    fits = {label: nccl.gid_problem(ports[label], index) is None for label, index in indices.items()}
    decisions = []
    family = "AF_INET"
    if indices and not any(fits.values()):
        over_v6 = {label: nccl.gid_index(ports[label], family="AF_INET6") for label in indices}
        if all(nccl.gid_problem(ports[label], index) is None for label, index in over_v6.items()):
            family, indices = "AF_INET6", over_v6
            why = "no RoCE v2 entry with an IPv4 address; every chosen port has a routable IPv6 one"
            decisions.append(Decision("NCCL_IB_ADDR_FAMILY", family, why, GUIDE))
    shown = ", ".join(f"{label}: {index}" for label, index in indices.items()) or "the GID tables could not be read"
    version = nccl.parse_version(case.facts.software.nccl)
    if version is not None and version < nccl.SCANS_GIDS_SINCE:
        values = set(indices.values())
        if len(values) == 1 and len(indices) == len(ports):
            why = f"NCCL {case.facts.software.nccl} does not look for the RoCE v2 entry itself; on this node it is ({shown})"
            return [*decisions, Decision(name, str(values.pop()), why, GUIDE)]
        why = f"NCCL {case.facts.software.nccl} needs one index for all ports, and there is none ({shown})"
        return [*decisions, Decision(name, None, why, GUIDE)]
    why = f"NCCL ≥ 2.21 finds the RoCE v2 entry of each port itself; a fixed index breaks where hosts differ ({shown})"
    return [*decisions, Decision(name, None, why, GUIDE)]


def _chosen_ports(case: _Case) -> dict[str, HcaPort]:
    wanted = {(port.hca, port.port): port.value(case.facts) for port in case.hcas.ports}
    return {
        wanted[(hca.name, port.port)]: port
        for hca in case.facts.hcas
        for port in hca.ports
        if (hca.name, port.port) in wanted
    }


def _provider(case: _Case) -> list[Decision]:
    if case.provider is None or case.num_nodes == 1:
        return []
    title, source = case.provider.title, case.provider.source
    return [
        Decision(variable, setting.value, f"{title}: {setting.reason}", source)
        for variable, setting in case.provider.settings.items()
    ]


def _left_to_nccl(case: _Case) -> list[Decision]:
    """Variables that guides on the web set, and that are right as they are."""
    if case.hcas.transport not in ("infiniband", "roce") or case.num_nodes == 1:
        return []
    if case.request.is_rail_only:
        cross = Decision("NCCL_CROSS_NIC", "0", "the rails do not meet, so NICs of different number cannot talk", GUIDE)
    else:
        why = "NCCL decides by itself; 0 is needed where rails do not meet (say so with --rail-only)"
        cross = Decision("NCCL_CROSS_NIC", None, why, GUIDE)
    return [
        cross,
        Decision("NCCL_NET_GDR_LEVEL", None, "NCCL allows GPUDirect RDMA by distance itself", GUIDE),
        Decision("NCCL_IB_TIMEOUT", None, "default 20 with 7 retries", GUIDE),
        Decision("NCCL_IB_QPS_PER_CONNECTION", None, "default 1; more is for fabrics that need it for routing", GUIDE),
        Decision("NCCL_IB_PCI_RELAXED_ORDERING", None, "default 2: on where the NIC can", GUIDE),
        Decision("NCCL_NVLS_ENABLE", None, "default 2: used where the NVSwitches can", GUIDE),
    ]


def _watchdog(case: _Case) -> list[Decision]:
    if not case.facts.gpus:
        return []
    decisions = [
        Decision(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING", "1", "a failed collective ends the rank instead of hanging it", TORCHRUN
        ),
        Decision(
            "TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "a timed-out collective leaves a trace of the last collectives", TORCH
        ),
    ]
    version = nccl.parse_version(case.facts.software.torch)
    name = "TORCH_NCCL_TRACE_BUFFER_SIZE"
    if version is not None and version >= FLIGHT_RECORDER_ON_SINCE:
        why = f"torch {case.facts.software.torch} keeps the last {FLIGHT_RECORDER_ENTRIES} collectives by default"
        decisions.append(Decision(name, None, why, TORCH))
    else:
        why = "switches the flight recorder on: the trace names the collective and the ranks that are missing"
        decisions.append(Decision(name, str(FLIGHT_RECORDER_ENTRIES), why, TORCH))
    prefix = case.request.flight_recorder_prefix
    if prefix is not None:
        why = "the trace goes to the run directory, one file per rank"
        decisions.append(Decision("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", prefix, why, TORCH))
    return decisions


def _nccl_log(case: _Case) -> list[Decision]:
    """NCCL never says unasked whether it found RDMA: its log is the only proof, so it is written where the launcher reads it."""
    path = case.request.nccl_log
    if not case.facts.gpus or case.num_nodes == 1 or path is None:
        return []
    names = ("NCCL_DEBUG", "NCCL_DEBUG_FILE")
    theirs = [name for name in (*names, "NCCL_DEBUG_SUBSYS") if name in case.user_env]
    if theirs:
        why = f"you have set {' and '.join(theirs)}: NCCL's log is yours"
        return [Decision(name, None, why, GUIDE) for name in names]
    return [
        Decision(
            "NCCL_DEBUG", "INFO", "the log says which transport carries each channel; read once by the launcher", GUIDE
        ),
        Decision(
            "NCCL_DEBUG_FILE",
            path,
            "the log goes to the run directory, one file per process, not among the output",
            GUIDE,
        ),
    ]


def _threads(case: _Case) -> list[Decision]:
    name = "OMP_NUM_THREADS"
    if case.num_ranks <= 1:
        return [Decision(name, None, "one rank on this node may use all CPUs", TORCHRUN)]
    allowed = len(case.facts.cpus.allowed) if case.facts.cpus.allowed is not None else case.facts.cpus.num_cpus
    share = f"; {allowed} CPUs for {case.num_ranks} ranks, set more if operators on the CPU matter" if allowed else ""
    return [Decision(name, "1", f"several ranks share this node, as torchrun does it{share}", TORCHRUN)]


_RULES: tuple[Callable[[_Case], list[Decision]], ...] = (
    _provider,
    _interface,
    _ib_hca,
    _gid,
    _left_to_nccl,
    _watchdog,
    _nccl_log,
    _threads,
)
