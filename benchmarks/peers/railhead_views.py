"""Railhead without a copy before the batch: members are views of the cache's files."""

from __future__ import annotations

from benchmarks.peers import Task
from benchmarks.peers.railhead import RailheadLoader


def open_loader(task: Task) -> RailheadLoader:
    return RailheadLoader(task, zero_copy=True)
