"""Fixtures for all tests, and where marked tests run."""

from __future__ import annotations

import pytest
from hypothesis import settings

from tests.counting_origin import counting_origin
from tests.daemon import cache_daemon, open_cache
from tests.raycluster import ray_cluster
from tests.weed import bucket, s3_environment, shared_bucket, weed

# No test asserts a wall-clock time, those of hypothesis neither: 200 ms for an example is what a busy machine takes now and then.
settings.register_profile("railhead", deadline=None)
settings.load_profile("railhead")

__all__ = [
    "bucket",
    "cache_daemon",
    "counting_origin",
    "open_cache",
    "ray_cluster",
    "s3_environment",
    "shared_bucket",
    "weed",
]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests with the S3 server share one xdist worker: a second worker would start a second server (10 s, 0.5 GB)."""
    for item in items:
        if item.get_closest_marker("s3") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("s3"))
