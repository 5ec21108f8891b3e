"""What a directory holds after whatever happened to it: files and index compared, the difference settled in favour of the files.

Nothing found is trusted: blocks come back as unverified, and are served only after their checksum was seen.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from cache.blocks import ExtentId
from cache.errors import CorruptBlock
from cache.store.directory import CacheDirectory
from cache.store.files import found_extents, read_header
from cache.store.index import Index, IndexRow


@dataclass
class Recovered:
    """`rows`: extents whose files are there. `num_adopted`: files that the index had lost; `num_discarded`: files that could not be
    used; `num_lost`: rows without a file."""

    rows: list[IndexRow] = field(default_factory=list)
    num_adopted: int = 0
    num_discarded: int = 0
    num_lost: int = 0


def recover(directory: CacheDirectory, index: Index) -> Recovered:
    """Settles index and files; touches nothing that is not an extent file of ours."""
    result = Recovered()
    lost = {(row.extent, row.generation): row for row in index.rows()}
    unindexed: list[tuple[ExtentId, int, Path]] = []
    for extent, generation, path in found_extents(directory):
        row = lost.pop((extent, generation), None)
        if row is not None:
            result.rows.append(row)
        else:
            unindexed.append((extent, generation, path))
    adopted = _adopt(unindexed, {row.extent for row in result.rows}, result)
    result.rows.extend(adopted)
    result.num_lost = len(lost)
    index.remove(lost)
    index.add(adopted)
    return result


def _adopt(files: list[tuple[ExtentId, int, Path]], taken: set[ExtentId], result: Recovered) -> list[IndexRow]:
    """Rows for files that the index does not know, the youngest of each extent; the rest (unreadable, or of an extent that has a file
    already: a crash between making the new one and removing the old) is removed."""
    adopted: dict[ExtentId, IndexRow] = {}
    for extent, generation, path in sorted(files, key=lambda file: -file[1]):
        header = None
        if extent not in taken and extent not in adopted:
            with contextlib.suppress(CorruptBlock):
                header, _ = read_header(path)
        if header is not None and ExtentId(header.object_id.content_id, header.extent_idx) == extent:
            adopted[extent] = IndexRow(header.object_id, header.extent_idx, generation, header.file_bytes)
            result.num_adopted += 1
        else:
            path.unlink(missing_ok=True)
            result.num_discarded += 1
    return list(adopted.values())
