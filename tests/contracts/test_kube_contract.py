"""What the client relies on of an API server, asked of our own fake, and of a real one where there is one:

RAILHEAD_TEST_KUBECONFIG=~/.kube/config RAILHEAD_TEST_NAMESPACE=default python -m pytest tests/contracts/test_kube_contract.py

Everything is done with ConfigMaps of a name of the test's own, which are deleted.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.k8s.client import Kube
from launcher.k8s.refusals import ApiRefused
from tests.fakes.apiserver import serving

REAL = os.environ.get("RAILHEAD_TEST_KUBECONFIG")
NAMESPACE = os.environ.get("RAILHEAD_TEST_NAMESPACE", "default")
LABEL = "railhead.dev/test"


@pytest.fixture(params=["fake", "real"])
def kube(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kube]:
    if request.param == "real":
        if REAL is None:
            pytest.skip("needs a cluster: set RAILHEAD_TEST_KUBECONFIG")
        monkeypatch.setenv("KUBECONFIG", REAL)
        one = Kube()
        yield one
        one.close()
        return
    with serving(tmp_path) as (_, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        one = Kube()
        yield one
        one.close()


@pytest.fixture
def name(kube: Kube) -> Iterator[str]:
    found = f"railhead-test-{secrets.token_hex(4)}"
    yield found
    for other in (found, f"{found}-2"):
        kube.delete("ConfigMap", NAMESPACE, other)


def config(name: str, **data: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": NAMESPACE, "labels": {LABEL: name.removesuffix("-2")}}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def refused(code: int, reason: str = "") -> Any:
    return pytest.raises(ApiRefused, match=f"^{code} {reason}")


def test_a_dry_run_leaves_nothing(kube: Kube, name: str) -> None:
    kube.create(config(name, a="1"), dry_run=True)
    kube.apply(config(name, a="1"), dry_run=True)
    assert not kube.exists("ConfigMap", NAMESPACE, name)


def test_of_two_creations_one_wins(kube: Kube, name: str) -> None:
    """On this a job that is submitted twice runs once."""
    assert kube.create(config(name, a="1"))["metadata"]["uid"]
    with refused(409, "AlreadyExists"):
        kube.create(config(name, a="2"))
    with refused(409, "AlreadyExists"):
        kube.create(config(name, a="2"), dry_run=True)
    assert kube.get("ConfigMap", NAMESPACE, name)["data"] == {"a": "1"}


def test_apply_makes_it_and_makes_it_so(kube: Kube, name: str) -> None:
    made = kube.apply(config(name, a="1", b="1"))
    changed = kube.apply(config(name, a="2"))
    assert changed["metadata"]["uid"] == made["metadata"]["uid"]
    assert kube.get("ConfigMap", NAMESPACE, name)["data"] == {"a": "2"}, "what is no longer applied is gone"


def test_apply_wins_over_another_manager(kube: Kube, name: str) -> None:
    kube.create(config(name, a="theirs"))
    assert kube.apply(config(name, a="ours"))["data"]["a"] == "ours"


def test_an_unknown_field_is_refused_and_not_dropped(kube: Kube, name: str) -> None:
    with refused(400) as refusal:
        kube.create({**config(name), "datum": {"a": "1"}})
    assert 'unknown field "datum"' in refusal.value.message
    assert not kube.exists("ConfigMap", NAMESPACE, name)


def test_what_is_not_there_is_told_from_what_nobody_knows(kube: Kube, name: str) -> None:
    with refused(404) as refusal:
        kube.get("ConfigMap", NAMESPACE, name)
    assert refusal.value.details["name"] == name
    assert kube.delete("ConfigMap", NAMESPACE, name) is False
    with refused(404):
        kube.create({**config(name), "metadata": {"name": name, "namespace": f"{name}-nowhere"}})


def test_lists_take_labels_and_names(kube: Kube, name: str) -> None:
    kube.create(config(name))
    kube.create(config(f"{name}-2"))
    by_label = kube.list("ConfigMap", NAMESPACE, labelSelector=f"{LABEL}={name}")["items"]
    assert [one["metadata"]["name"] for one in by_label] == [name, f"{name}-2"]
    by_name = kube.list("ConfigMap", NAMESPACE, fieldSelector=f"metadata.name={name}-2")["items"]
    assert [one["metadata"]["name"] for one in by_name] == [f"{name}-2"]


def test_a_watch_tells_all_that_happened_since_a_list(kube: Kube, name: str) -> None:
    """Nothing between the list and the watch is missed."""
    selector = {"fieldSelector": f"metadata.name={name}"}
    version = kube.list("ConfigMap", NAMESPACE, **selector)["metadata"]["resourceVersion"]
    kube.create(config(name, a="1"))
    kube.apply(config(name, a="2"))
    kube.delete("ConfigMap", NAMESPACE, name)
    events = []
    for event in kube.watch("ConfigMap", NAMESPACE, version, 30, **selector):
        if event["type"] != "BOOKMARK":
            events.append(event)
        if event["type"] == "DELETED":
            break
    assert [event["type"] for event in events] == ["ADDED", "MODIFIED", "DELETED"]
    assert [event["object"]["data"]["a"] for event in events] == ["1", "2", "2"]


def test_a_quiet_watch_ends_by_itself(kube: Kube, name: str) -> None:
    version = kube.list("ConfigMap", NAMESPACE)["metadata"]["resourceVersion"]
    events = kube.watch("ConfigMap", NAMESPACE, version, 1, fieldSelector=f"metadata.name={name}")
    assert {event["type"] for event in events} <= {"BOOKMARK"}


def test_what_is_owned_goes_with_its_owner(kube: Kube, name: str) -> None:
    owner = kube.create(config(name))
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": name, "uid": owner["metadata"]["uid"]}
    owned = config(f"{name}-2")
    owned["metadata"]["ownerReferences"] = [reference]
    kube.create(owned)
    assert kube.delete("ConfigMap", NAMESPACE, name)
    for _ in range(600):
        if not kube.exists("ConfigMap", NAMESPACE, f"{name}-2"):
            return
        time.sleep(0.1)
    pytest.fail("the garbage collector never came")
