"""Footers and headers with anything in them: a FormatError or a data set, never a crash, a hang or another exception.

pyarrow is native code, so its part runs in a process of its own: what kills it fails this test with the seed that did it.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import io, random, sys, tarfile
import pyarrow as pa, pyarrow.parquet as pq
from cache.client.formats.parquet import ParquetFormat
from cache.client.formats.tar import TarFormat
from cache.errors import FormatError
from tests.cache.stored import Stored

kind, first, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def parquet():
    out = io.BytesIO()
    columns = {"a": list(range(20)), "s": [str(n) for n in range(20)], "l": [[n] for n in range(20)], "d": ["x"] * 20}
    pq.write_table(pa.table(columns), out, row_group_size=7)
    return out.getvalue()

def tar():
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(6):
            info = tarfile.TarInfo("d" * 90 * (number % 2) + f"/{number}.bin")
            info.size, info.pax_headers = 100 * number, {"comment": "é"} if number % 3 == 0 else {}
            archive.addfile(info, io.BytesIO(bytes(info.size)))
    return out.getvalue()

def read_parquet(shard):
    form = ParquetFormat()
    index = form.index(shard)
    starts = index.member_counts.cumsum() - index.member_counts
    rows = 0
    for start, size in zip(starts.tolist(), index.unit_sizes.tolist()):
        assert size < 10**6
        unit = form.open_unit(shard, "parquet", int(index.offsets[start]), int(index.lengths[start]))
        try:
            rows += sum(len(unit.sample(number)) >= 0 for number in range(unit.num_samples))
        except ValueError:
            pass  # the data set makes a FormatError of it
    return rows

def read_tar(shard):
    index = TarFormat().index(shard)
    assert all(0 <= o and o + n <= shard.size for o, n in zip(index.offsets.tolist(), index.lengths.tolist()))
    return index.num_samples

whole = {"parquet": parquet, "tar": tar}[kind]()
read = {"parquet": read_parquet, "tar": read_tar}[kind]
begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little") if kind == "parquet" else 0
refused = 0
for seed in range(first, first + count):
    print(seed, flush=True)
    chance = random.Random(seed)
    data = bytearray(whole)
    for _ in range(chance.choice([1, 1, 2, 8])):
        place = chance.randrange(begin, len(data))
        data[place] = chance.choice([0, 1, 127, 128, 255, data[place] ^ 1 << chance.randrange(8), chance.randrange(256)])
    if chance.random() < 0.1:
        at = chance.randrange(begin, len(data))
        del data[at : at + chance.randrange(1, 600)]
    try:
        read(Stored(bytes(data)))
    except FormatError as error:
        assert error.url == "mem://b/shard" and "mem://b/shard" in error.message
        refused += 1
print("refused", refused)
"""

NUM_INPUTS = {"parquet": 1500, "tar": 1500}


@pytest.mark.parametrize("kind", NUM_INPUTS)
def test_whatever_is_in_it_it_is_refused_by_name_or_read(kind: str) -> None:
    command = [sys.executable, "-c", PROGRAM, kind, "0", str(NUM_INPUTS[kind])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (
        f"seed {lines[-1] if lines else '-'} ended it with {done.returncode}:\n{done.stderr[-2000:]}"
    )
    assert int(lines[-1].removeprefix("refused ")) > NUM_INPUTS[kind] / 10, "the changes must reach what is read"
