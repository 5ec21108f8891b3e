"""The samples of the epoch benchmark, and their shards in the format of each loader.

A sample is its number in 8 bytes followed by pseudo-random bytes, so that whoever gets one knows which it is and what it must be.
"""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import crc32c
import numpy as np

from cache.origin.registry import close_origins, origin_for

_NUMBER_BYTES = 8


@dataclass(frozen=True)
class Dataset:
    """What all loaders are given. `offsets` says of each sample in which tar it lies and where; `checksums` what it must be."""

    url: str
    local_dir: str
    num_samples: int
    sample_bytes: int
    samples_per_shard: int
    shards: tuple[str, ...] = ()
    offsets: tuple[tuple[int, int], ...] = ()
    checksums: tuple[int, ...] = ()

    @property
    def num_bytes(self) -> int:
        return self.num_samples * self.sample_bytes

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self)))


def load(path: Path) -> Dataset:
    fields = json.loads(path.read_text())
    fields["offsets"] = tuple(tuple(place) for place in fields["offsets"])
    return Dataset(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def sample(number: int, size_bytes: int) -> bytes:
    """The bytes of one sample."""
    return number.to_bytes(_NUMBER_BYTES, "little") + np.random.default_rng(number).bytes(size_bytes - _NUMBER_BYTES)


def number_of(data: bytes | memoryview) -> int:
    return int.from_bytes(data[:_NUMBER_BYTES], "little")


def write_tars(dataset: Dataset) -> Dataset:
    """Tar shards below url/tar/ and local_dir/tar/; the dataset with its index."""
    shards: list[str] = []
    offsets: list[tuple[int, int]] = []
    checksums: list[int] = []
    local = Path(dataset.local_dir) / "tar"
    local.mkdir(parents=True)
    for shard_idx, numbers in enumerate(_shards(dataset)):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for number in numbers:
                data = sample(number, dataset.sample_bytes)
                info = tarfile.TarInfo(f"{number:08d}.bin")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
                # addfile has written the data, padded to 512 bytes, as the last thing.
                offsets.append((shard_idx, tar.offset - -(-len(data) // 512) * 512))
                checksums.append(crc32c.crc32c(data))
        name = f"tar/{shard_idx:05d}.tar"
        (Path(dataset.local_dir) / name).write_bytes(packed.getvalue())
        shards.append(name)
    upload(local, f"{dataset.url}/tar")
    return dataclasses.replace(dataset, shards=tuple(shards), offsets=tuple(offsets), checksums=tuple(checksums))


def upload(directory: Path, url: str) -> None:
    """Every file below a directory, under the same names below a url."""

    async def main() -> None:
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            target = f"{url}/{path.relative_to(directory)}"
            await origin_for(target).put(target, path.read_bytes())
        await close_origins()

    asyncio.run(main())


def _shards(dataset: Dataset) -> Iterator[range]:
    for start in range(0, dataset.num_samples, dataset.samples_per_shard):
        yield range(start, min(start + dataset.samples_per_shard, dataset.num_samples))
