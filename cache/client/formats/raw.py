"""Plain files: each object is a sample, its class the directory it lies in (torchvision's ImageFolder layout).

`train/cat/1.jpg` below `train` is the sample `cat/1.jpg` with the members `jpg` (the file) and `cls` (the number of
class `cat` among the sorted classes), so that a decoder for tar shards decodes raw files too. The listing says
everything; no object is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cache.client.formats.index import MAX_SKIPPED_KEPT, SampleIndex, Shard
from cache.client.formats.tar import split_key

if TYPE_CHECKING:
    from cache.origin.ports import ObjectInfo


@dataclass(frozen=True)
class RawFormat:
    """Each object is one sample. Hidden files (a name that begins with a dot) are skipped."""

    suffixes: tuple[str, ...] = ()
    """Only objects whose name ends with one of these, in any case; empty: all objects."""
    has_classes: bool = True
    """Whether the first directory below the prefix names a sample's class."""

    def accepts(self, url: str) -> bool:
        return not self.suffixes or url.lower().endswith(tuple(suffix.lower() for suffix in self.suffixes))

    def index_listing(self, root_url: str, objects: Sequence[ObjectInfo]) -> SampleIndex:
        """Samples in the order of the listing. A file that lies in no directory has the class of no name, ''."""
        root = root_url.rstrip("/") + "/"
        keys: list[str] = []
        shards: list[Shard] = []
        skipped: list[tuple[str, str, str]] = []
        for info in objects:
            key = info.url.removeprefix(root) if info.url.startswith(root) else info.url.rpartition("/")[2]
            if key.rpartition("/")[2].startswith("."):
                skipped.append((info.url, key, "hidden file"))
                continue
            keys.append(key)
            shards.append(Shard(info.url, info.etag, info.size_bytes))
        names = [split_key(key)[1] for key in keys]
        extensions = sorted(set(names))
        number = {extension: idx for idx, extension in enumerate(extensions)}
        folders = [key.partition("/")[0] if "/" in key else "" for key in keys]
        classes = sorted(set(folders)) if self.has_classes else []
        class_number = {name: idx for idx, name in enumerate(classes)}
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        each = np.arange(len(keys) + 1, dtype=np.int64)
        return SampleIndex(
            shards=tuple(shards),
            sample_starts=each,
            member_starts=each,
            offsets=np.zeros(len(keys), dtype=np.int64),
            lengths=np.array([shard.size_bytes for shard in shards], dtype=np.int64),
            extensions=tuple(extensions),
            extension_ids=np.array([number[name] for name in names], dtype=np.int32),
            key_starts=np.concatenate([[0], np.cumsum([len(key) for key in encoded])]).astype(np.int64),
            key_bytes=b"".join(encoded),
            classes=tuple(classes),
            class_ids=np.array([class_number[name] for name in folders], dtype=np.int32) if self.has_classes else None,
            num_skipped=len(skipped),
            skipped=tuple(skipped[:MAX_SKIPPED_KEPT]),
        )
