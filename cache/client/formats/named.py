"""Formats by their names, for command lines."""

from __future__ import annotations

from cache.client.formats.ports import ShardFormat
from cache.client.formats.tar import TarFormat

BY_NAME: dict[str, ShardFormat] = {"tar": TarFormat()}
"""Those whose index is worth keeping."""
