"""Formats by their names, for command lines."""

from __future__ import annotations

from cache.client.formats.mds import MdsFormat
from cache.client.formats.parquet import ParquetFormat
from cache.client.formats.ports import ManifestFormat, ShardFormat
from cache.client.formats.tar import TarFormat

BY_NAME: dict[str, ShardFormat | ManifestFormat] = {"tar": TarFormat(), "mds": MdsFormat(), "parquet": ParquetFormat()}
"""Those whose index is worth keeping."""
