"""An API server of our own, which the Kubernetes client finds by KUBECONFIG as it finds any."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.k8s import client
from launcher.k8s.client import Kube
from tests.fakes.apiserver import FakeApiServer, serving


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeApiServer]:
    with serving(tmp_path) as (state, kubeconfig):
        monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
        monkeypatch.setattr(client.time, "sleep", lambda _: None)
        monkeypatch.setattr(Kube.__init__, "__kwdefaults__", {"sleep": lambda _: None})
        monkeypatch.chdir(tmp_path)
        yield state
