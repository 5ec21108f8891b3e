"""The environment of the ranks: each value with a reason, the user's word last, nothing where the default is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from launcher.fabric.binding import cpu_list, parse_cpu_list, visible_gpus
from launcher.fabric.cloud import GIB_SCRIPT, recognise
from launcher.fabric.facts import Cpus, Gid, Gpu, Hca, HcaPort, Kubernetes, Netdev, NodeFacts, Platform, Software
from launcher.fabric.rules import GangRequest, NodeEnvironment, environment

SEVERAL = GangRequest(num_nodes=2)
Recorded = Callable[[str], NodeFacts]


def _one(facts: NodeFacts, request: GangRequest = SEVERAL, **user_env: str) -> NodeEnvironment:
    return environment([facts], request, user_env)[0]


def _value(node: NodeEnvironment, variable: str) -> str | None:
    decision = node.decision(variable)
    assert decision is not None, f"no decision about {variable}"
    return decision.value


@pytest.mark.parametrize("name", ["dgx-a100", "oci-bm-gpu-h100-8", "aws-p5-48xlarge", "gpuless-microvm"])
def test_every_decision_has_a_reason_and_a_source(recorded: Recorded, name: str) -> None:
    for decision in _one(recorded(name)).decisions:
        assert decision.reason
        assert decision.source


@pytest.mark.parametrize("name", ["dgx-a100", "oci-bm-gpu-h100-8", "aws-p5-48xlarge"])
def test_the_users_value_always_wins(recorded: Recorded, name: str) -> None:
    """Whatever the rule: what the user set is not among what we add, and the difference is kept to be shown."""
    facts = recorded(name)
    for decision in _one(facts).decisions:
        node = _one(facts, **{decision.variable: "mine"})
        assert decision.variable not in node.variables()
        shown = node.decision(decision.variable)
        assert shown is not None
        assert (shown.effective, shown.value) == ("mine", decision.value)
        assert shown.is_overruled


def test_an_empty_value_is_the_users_word_too(recorded: Recorded) -> None:
    assert "NCCL_IB_HCA" not in _one(recorded("dgx-a100"), NCCL_IB_HCA="").variables()


def test_one_node_needs_no_network(recorded: Recorded) -> None:
    """On a laptop or a single machine nothing of the network is set."""
    variables = _one(recorded("dgx-a100"), GangRequest()).variables()
    assert not {name for name in variables if name.startswith(("NCCL_", "GLOO_"))}


def test_nothing_is_set_where_nccl_takes_the_right_ports_itself(recorded: Recorded) -> None:
    facts = recorded("dgx-a100")
    keep = {"mlx5_0", "mlx5_1", "mlx5_2", "mlx5_3", "mlx5_6", "mlx5_7", "mlx5_8", "mlx5_9"}
    clean = replace(facts, hcas=tuple(hca for hca in facts.hcas if hca.name in keep))
    decision = _one(clean).decision("NCCL_IB_HCA")
    assert decision is not None
    assert decision.value is None
    assert "by itself" in decision.reason


def test_unequal_hosts_get_their_own_interface() -> None:
    """One NCCL_SOCKET_IFNAME for all hosts is wrong as soon as one is called otherwise."""
    nodes = [
        NodeFacts(name, node_ip=f"10.0.0.{idx}", netdevs=(Netdev(dev, "up", addresses=(f"10.0.0.{idx}/24",)),))
        for idx, (name, dev) in enumerate([("a", "eth0"), ("b", "enp5s0f1")], 1)
    ]
    values = [_value(node, "NCCL_SOCKET_IFNAME") for node in environment(nodes, GangRequest(), {})]
    assert values == ["=eth0", "=enp5s0f1"]


def test_what_owns_no_local_address_is_not_guessed() -> None:
    facts = NodeFacts("a", node_ip="203.0.113.5", netdevs=(Netdev("eth0", "up", addresses=("10.0.0.1/24",)),))
    node = _one(facts)
    assert _value(node, "NCCL_SOCKET_IFNAME") is None
    assert "203.0.113.5" in (node.decision("NCCL_SOCKET_IFNAME") or pytest.fail("no decision")).reason


def test_a_pod_address_without_a_subnet_is_found() -> None:
    """Calico gives /32 addresses: no route names the subnet."""
    facts = NodeFacts("a", node_ip="10.1.2.3", netdevs=(Netdev("eth0", "up", addresses=("10.1.2.3/32",)),))
    assert _value(_one(facts), "NCCL_SOCKET_IFNAME") == "=eth0"


def test_rail_only_is_said_by_the_user(recorded: Recorded) -> None:
    facts = recorded("h20-roce-bond4")
    assert _value(_one(facts), "NCCL_CROSS_NIC") is None
    assert _value(_one(facts, replace(SEVERAL, is_rail_only=True)), "NCCL_CROSS_NIC") == "0"


def _roce(*gids: tuple[int, str, str]) -> NodeFacts:
    port = HcaPort(1, "ACTIVE", "LinkUp", 400.0, "Ethernet", gids=tuple(Gid(*gid) for gid in gids))
    return NodeFacts("a", gpus=(Gpu(0),), hcas=(Hca("rdma0", ports=(port,)),))


def test_an_ipv6_fabric_is_recognised() -> None:
    node = _one(_roce((0, "fe80::1", "RoCE v2"), (1, "2001:db8::1", "IB/RoCE v1"), (2, "2001:db8::1", "RoCE v2")))
    assert _value(node, "NCCL_IB_ADDR_FAMILY") == "AF_INET6"


def test_old_nccl_without_one_index_for_all_ports_is_told_so() -> None:
    """NCCL before 2.21 takes one index for all ports; where they differ there is no right value to set."""
    first = _roce((1, "::ffff:10.0.0.1", "RoCE v2"))
    second = _roce((3, "::ffff:10.0.1.1", "RoCE v2"))
    both = replace(first, hcas=(first.hcas[0], replace(second.hcas[0], name="rdma1")), software=Software(nccl="2.20.5"))
    decision = _one(both).decision("NCCL_IB_GID_INDEX")
    assert decision is not None
    assert decision.value is None
    assert "needs one index" in decision.reason


def _on(label: str, value: str = "", *, product: str | None = None, markers: tuple[str, ...] = ()) -> NodeFacts:
    facts = _roce((3, "::ffff:10.0.0.1", "RoCE v2"))
    return replace(
        facts,
        kubernetes=Kubernetes(labels={label: value}),
        platform=Platform(product=product, markers=markers, is_virtual=False),
    )


@pytest.mark.parametrize(
    ("facts", "provider", "variable", "value"),
    [
        (_on("oci.oraclecloud.com/rdma.cluster_id"), "oci", "NCCL_IB_TC", "41"),
        (_on("ib.coreweave.cloud/fabric"), "coreweave", "NCCL_NET_PLUGIN", "none"),
        (
            _on("node.kubernetes.io/instance-type", "a3-ultragpu-8g", markers=(GIB_SCRIPT,)),
            "gke-rdma",
            "NCCL_CROSS_NIC",
            "0",
        ),
        (_on("nebius.com/gpu"), "nebius", "NCCL_IB_HCA", None),
        (_on("node-role.together.ai/worker"), "together", "NCCL_IB_HCA", None),
    ],
)
def test_providers_are_recognised_and_set_what_their_manifests_set(
    facts: NodeFacts, provider: str, variable: str, value: str | None
) -> None:
    found = recognise(facts)
    assert found is not None
    assert found.id == provider
    assert _value(_one(facts), variable) == value


def test_a_provider_whose_plugin_is_absent_sets_nothing() -> None:
    """NCCL_NET=gIB without the plugin is a failure to start instead of a slow start."""
    facts = _on("node.kubernetes.io/instance-type", "a3-ultragpu-8g")
    provider = recognise(facts)
    assert provider is not None
    assert provider.needs_plugin is not None
    assert "NCCL_NET" not in _one(facts).variables()


def test_efa_is_left_to_its_plugin(recorded: Recorded) -> None:
    """The plugin tunes itself per instance type; values from blogs fight with it."""
    variables = _one(recorded("aws-p5-48xlarge")).variables()
    assert not {"NCCL_IB_HCA", "NCCL_BUFFSIZE", "FI_PROVIDER", "NCCL_P2P_NET_CHUNKSIZE"} & set(variables)
    old = recorded("aws-p5-48xlarge")
    old = replace(old, software=replace(old.software, ofi_nccl="1.4.0"))
    assert _one(old).variables()["FI_PROVIDER"] == "efa"


def test_threads_are_as_torchrun_sets_them(recorded: Recorded) -> None:
    facts = recorded("gpuless-microvm")
    assert _value(_one(facts, GangRequest(local_world_size=4)), "OMP_NUM_THREADS") == "1"
    assert _value(_one(facts, GangRequest(local_world_size=1)), "OMP_NUM_THREADS") is None


def test_flight_recorder_is_switched_on_only_where_torch_leaves_it_off(recorded: Recorded) -> None:
    facts = recorded("dgx-a100")
    for version, value in (("2.6.0", "2000"), ("2.13.0+cu129", None), (None, "2000")):
        node = _one(replace(facts, software=Software(torch=version)))
        assert _value(node, "TORCH_NCCL_TRACE_BUFFER_SIZE") == value
    node = _one(facts, replace(SEVERAL, flight_recorder_prefix="/run/trace_"))
    assert _value(node, "TORCH_NCCL_DEBUG_INFO_TEMP_FILE") == "/run/trace_"


def test_ranks_are_bound_to_the_cpus_beside_their_gpu(recorded: Recorded) -> None:
    bindings = _one(recorded("dgx-a100")).bindings
    assert [binding.memory_node for binding in bindings] == [3, 3, 1, 1, 7, 7, 5, 5]
    assert cpu_list(bindings[0].cpus or ()) == "48-63,176-191"


def test_visible_devices_are_followed(recorded: Recorded) -> None:
    """Rank 0 with CUDA_VISIBLE_DEVICES=6 is on GPU 6, on the other socket."""
    bindings = _one(recorded("dgx-a100"), GangRequest(2, 2), CUDA_VISIBLE_DEVICES="6,2").bindings
    assert [binding.memory_node for binding in bindings] == [5, 1]


def test_visible_devices_are_read_as_cuda_reads_them() -> None:
    facts = NodeFacts("a", gpus=tuple(Gpu(idx, uuid=f"GPU-{idx}{idx}") for idx in range(4)))
    assert visible_gpus(facts, {}) == (0, 1, 2, 3)
    assert visible_gpus(facts, {"CUDA_VISIBLE_DEVICES": "3,1"}) == (3, 1)
    assert visible_gpus(facts, {"CUDA_VISIBLE_DEVICES": "GPU-22,0"}) == (2, 0)
    assert visible_gpus(facts, {"CUDA_VISIBLE_DEVICES": "1,9,0"}) == (1,), "an unknown name ends the list"
    assert visible_gpus(facts, {"CUDA_VISIBLE_DEVICES": ""}) == ()


@pytest.mark.parametrize(
    ("bind", "change", "part"),
    [
        ("none", {}, "switched off"),
        ("auto", {"allowed": tuple(range(48, 64))}, "not every rank"),
        ("auto", {"numa": ()}, "not known"),
    ],
)
def test_a_binding_that_cannot_be_right_is_not_made(
    recorded: Recorded, bind: str, change: dict[str, tuple[int, ...]], part: str
) -> None:
    """Binding half the ranks, or to CPUs that the container may not use, is worse than none."""
    facts = recorded("dgx-a100")
    cpus = Cpus(**{**{name: getattr(facts.cpus, name) for name in Cpus.__dataclass_fields__}, **change})
    node = _one(replace(facts, cpus=cpus), GangRequest(num_nodes=2, bind=bind))  # type: ignore[arg-type]
    assert all(binding.cpus is None for binding in node.bindings)
    assert part in node.bindings[0].reason


def test_cpu_lists_are_read_back() -> None:
    for cpus in ((), (0,), (0, 1, 2), (0, 2, 4), (5, 6, 9)):
        assert parse_cpu_list(cpu_list(cpus)) == cpus
    for text in ("a", "3-1", "1-", "-", "0-99999999"):
        assert parse_cpu_list(text) is None


def test_nccl_logs_where_the_launcher_reads_it_and_never_over_a_users_wish(recorded: Recorded) -> None:
    """A log is the only proof of RDMA. Who debugs NCCL himself gets exactly what he asked for."""
    facts = recorded("dgx-a100")
    request = replace(SEVERAL, nccl_log="/run/nccl.n0.%p.log")
    node = _one(facts, request)
    assert (_value(node, "NCCL_DEBUG"), _value(node, "NCCL_DEBUG_FILE")) == ("INFO", "/run/nccl.n0.%p.log")
    for theirs in ("NCCL_DEBUG", "NCCL_DEBUG_FILE", "NCCL_DEBUG_SUBSYS"):
        assert not {name for name in _one(facts, request, **{theirs: "WARN"}).variables() if "DEBUG" in name}
    for quiet in (_one(facts), _one(facts, replace(request, num_nodes=1)), _one(recorded("gpuless-microvm"), request)):
        assert quiet.decision("NCCL_DEBUG") is None
