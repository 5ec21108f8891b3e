"""Railhead with a bounded working set: shards shuffled, samples shuffled within two of them, as the streaming libraries shuffle."""

from __future__ import annotations

from benchmarks.peers import Task
from benchmarks.peers.railhead import RailheadLoader


def open_loader(task: Task) -> RailheadLoader:
    return RailheadLoader(task, shuffle="windowed:2")
