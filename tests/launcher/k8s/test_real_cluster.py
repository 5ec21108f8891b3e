"""The samples asked of a real cluster with KubeRay, as dry runs: nothing is created.

RAILHEAD_TEST_KUBECONFIG=~/.kube/config python -m pytest tests/launcher/k8s/test_real_cluster.py
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.cli import main

SAMPLES = Path(__file__).parents[3] / "k8s" / "samples"
KUBECONFIG = os.environ.get("RAILHEAD_TEST_KUBECONFIG")

pytestmark = pytest.mark.skipif(KUBECONFIG is None, reason="needs a cluster with KubeRay: set RAILHEAD_TEST_KUBECONFIG")


@pytest.mark.parametrize("name", ["smoke", "resnet", "roce", "efa", "gke-a3-ultra", "spot", "daemonset", "volcano"])
def test_a_real_api_server_would_take_the_sample(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert KUBECONFIG is not None
    monkeypatch.setenv("KUBECONFIG", KUBECONFIG)
    assert main(["submit", "--file", str(SAMPLES / f"{name}.job.yaml"), "--namespace", "default", "--dry-run"]) == 0
