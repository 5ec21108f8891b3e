"""The S3 server of a test session: one SeaweedFS, started when the first test asks for it, ended with the session."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from benchmarks.seaweed import SeaweedServer, WeedMissing, aws_environment, find_weed


@pytest.fixture(scope="session")
def weed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """A running SeaweedFS. Tests that use it are marked `s3`, which keeps them on one xdist worker, so that only one starts it."""
    try:
        find_weed()
    except WeedMissing as e:
        pytest.skip(str(e))
    with SeaweedServer(tmp_path_factory.mktemp("weed")) as server:
        yield server


@pytest.fixture(scope="session")
def shared_bucket(weed: SeaweedServer) -> str:
    """One bucket for all tests that keep to a directory of their own in it; a new bucket costs half a second."""
    weed.make_bucket("shared")
    return "shared"


@pytest.fixture
def bucket(weed: SeaweedServer) -> str:
    """The name of a new, empty bucket."""
    name = f"t-{uuid.uuid4().hex[:12]}"
    weed.make_bucket(name)
    return name


@pytest.fixture
def s3_environment(weed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """AWS_* of this process point at SeaweedFS for one test; the same dictionary serves child processes."""
    use_endpoint(monkeypatch, weed.endpoint)
    return weed.environment


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """AWS_* of this process point at an endpoint that accepts any key pair; other AWS settings of the person are out of the way."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_SKIP_SIGNATURE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in aws_environment(endpoint).items():
        monkeypatch.setenv(name, value)
