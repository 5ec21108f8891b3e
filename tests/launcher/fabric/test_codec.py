"""Facts as JSON: nothing is lost, nothing else is taken for facts, and no input is a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.fabric.codec import FORMAT, VERSION, from_json, to_json
from launcher.fabric.facts import FactsError, NodeFacts
from launcher.fabric.findings import findings
from launcher.fabric.rules import GangRequest

st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.from_type(NodeFacts))
def test_any_facts_survive_json(facts: NodeFacts) -> None:
    assert from_json(to_json(facts)) == facts


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.from_type(NodeFacts), min_size=1, max_size=3))
def test_no_facts_make_the_rules_or_checks_fail(nodes: list[NodeFacts]) -> None:
    """Facts come from other machines and other days; the doctor must say something about all of them."""
    findings(nodes, request=GangRequest(num_nodes=2))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(json_values)
def test_other_json_is_refused_with_a_sentence(value: object) -> None:
    for document in (value, {"format": FORMAT, "version": VERSION, "facts": value}):
        with pytest.raises(FactsError) as caught:
            from_json(json.dumps(document), source="x.json")
        assert "x.json" in str(caught.value)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_one_changed_field_is_refused_or_still_facts(data: st.DataObject) -> None:
    """Hand-edited files: a wrong type is named by its field, never half understood."""
    facts = {"hostname": "a", "netdevs": [{"name": "eth0", "mtu": 1500}], "memory": {"memlock_bytes": "unlimited"}}
    name = data.draw(st.sampled_from(["hostname", "netdevs", "memory", "cpus", "nonsense"]))
    facts[name] = data.draw(json_values)
    text = json.dumps({"format": FORMAT, "version": VERSION, "facts": facts})
    message = ""
    try:
        from_json(text)
    except FactsError as error:
        message = str(error)
    assert not message or name in message


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_is_said_to_be_one(version: object) -> None:
    with pytest.raises(FactsError, match="reads version 1"):
        from_json(json.dumps({"format": FORMAT, "version": version, "facts": {"hostname": "a"}}))


def test_truncated_and_deep_text_is_refused(tmp_path: object) -> None:
    for text in ("", "{", to_json(NodeFacts("a"))[:-2], "[" * 100_000):
        with pytest.raises(FactsError):
            from_json(text)


def test_unknown_stays_unknown(recorded: Callable[[str], NodeFacts]) -> None:
    """None must not come back as False: the checks act on what is known only."""
    facts = from_json(to_json(recorded("epyc-4gpu-flat")))
    assert facts.hcas[0].ports[0].rate_gbps is None
    assert facts.memory.memlock_bytes is None
    assert facts.platform.is_iommu_on is None
