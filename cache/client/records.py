"""What each rank was handed, written down: the proof for `python -m cache audit`.

One file for each rank of each start, one line for each batch, written when the batch is handed out and before the loop has it: if any rank
finished a step, every rank has written it. The numbers travel with the data through the workers; they are not the sampler's intention.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import Dataset, default_collate

from cache.errors import FormatError
from cache.order.audit import Stretch, order_from_json, order_to_json
from cache.order.batches import Cursor
from cache.order.mixing import Mixture
from cache.order.schedule import Schedule

log = logging.getLogger("railhead.cache.client")

VERSION = 1


class BatchRecords:
    """One rank's records of one start, below `directory` (of this node, or shared; `audit` takes several).

    All ranks must name the start alike, and later starts must sort later: `start` is by default rank 0's clock, which all ranks agree
    on when the records are made (where torch.distributed is initialised: a collective call). A disk that refuses a record ends the
    recording, not the training; the audit will miss it.
    """

    def __init__(self, directory: str | os.PathLike[str], *, start: str | None = None) -> None:
        self._fd: int | None = None
        self.directory = Path(directory)
        self.start = _agreed_start() if start is None else start
        self._next: Cursor | None = None

    def open(self, order: Schedule | Mixture, rank: int, world_size: int) -> None:
        """Begins the file. Called by the loader."""
        head = {"version": VERSION, "start": self.start, "rank": rank, "world_size": world_size, "pid": os.getpid()}
        path = self.directory / f"{self.start}-rank{rank:05}.jsonl"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self._broken(error)
        self._write({**head, "order": order_to_json(order)})

    def handed_out(self, place: Cursor, after: Cursor, samples: Sequence[int]) -> None:
        """A batch goes to the loop. `after`: the place behind it. A place that does not follow the last one is a resume."""
        if place != self._next:
            self._write({"begin": [place.epoch, place.step]})
        self._next = after
        self._write({"at": [place.epoch, place.step], "samples": [int(sample) for sample in samples]})

    def close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        self.close()

    def _write(self, line: dict[str, Any]) -> None:
        """One write for one line: a killed rank leaves whole ones."""
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        try:
            while self._fd is not None and data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            self._broken(error)

    def _broken(self, error: OSError) -> None:
        self.close()
        log.error("batches are no longer recorded in %s (%s); the audit will miss them", self.directory, error.strerror)


def _agreed_start() -> str:
    start = [f"{time.time_ns():020}"]
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list(start, src=0)
    return start[0]


class Numbered(Dataset[Any]):
    """A data set whose samples bring their numbers along."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, sample: int) -> tuple[int, Any]:
        return sample, self.dataset[sample]

    def __getitems__(self, samples: Sequence[int]) -> list[tuple[int, Any]]:
        several = getattr(self.dataset, "__getitems__", None)
        values = several(samples) if several is not None else [self.dataset[sample] for sample in samples]
        return list(zip(samples, values, strict=True))


class NumberedCollate:
    """Puts the numbers beside the batch that `collate` makes of the samples."""

    def __init__(self, collate: Callable[[list[Any]], Any] | None) -> None:
        self.collate = collate or default_collate

    def __call__(self, samples: list[tuple[int, Any]]) -> tuple[list[int], Any]:
        return [number for number, _ in samples], self.collate([value for _, value in samples])


# --- reading them back --------------------------------------------------------------------------------------------------------------


def read_records(directories: Iterable[Path]) -> tuple[Schedule | Mixture, list[Stretch]]:
    """All records of these directories. Raises FormatError naming the file for what is none, for records of different orders, and when
    there are none. A last line that a killed rank left half written is passed over."""
    orders: dict[str, Path] = {}
    stretches: dict[tuple[str, int], Stretch] = {}
    roots = list(directories)
    for path in sorted(path for root in roots for path in root.glob("*.jsonl")):
        try:
            lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
            if lines:
                if lines[0]["version"] != VERSION:
                    raise FormatError(f"{path}: records of version {lines[0]['version']}; this audit knows {VERSION}")
                orders.setdefault(json.dumps(lines[0]["order"], sort_keys=True), path)
                _read_file(lines, stretches, path)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise FormatError(
                f"{path}: not a rank's records: {type(error).__name__}: {error}", url=str(path)
            ) from error
    if not orders:
        where = ", ".join(map(str, roots))
        raise FormatError(f"{where}: no records", advice="train with ElasticLoader(…, records=DIRECTORY)", url=where)
    if len(orders) > 1:
        (one, first), (other, second) = list(orders.items())[:2]
        different = sorted(key for key, value in json.loads(one).items() if json.loads(other).get(key) != value)
        raise FormatError(
            f"{second} and {first} are of different orders: they differ in {', '.join(different)}",
            advice="use a directory of its own for each data set, seed and batch size",
            url=str(second),
        )
    return order_from_json(json.loads(next(iter(orders)))), list(stretches.values())


def _read_file(lines: list[dict[str, Any]], stretches: dict[tuple[str, int], Stretch], path: Path) -> None:
    head, number, stretch = lines[0], -1, None
    for line in lines[1:]:
        if "begin" in line:
            number += 1
            begin = Cursor(*line["begin"])
            stretch = stretches.setdefault(
                (head["start"], number), Stretch(head["start"], number, head["world_size"], begin)
            )
            if (stretch.begin, stretch.world_size) != (begin, head["world_size"]):
                raise FormatError(
                    f"{path}: rank {head['rank']} of {head['world_size']} began at {begin}, another rank of the same start, "
                    f"of {stretch.world_size}, at {stretch.begin}",
                    url=str(path),
                )
            continue
        if stretch is None:
            raise FormatError(f"{path}: a batch before any beginning", url=str(path))
        ranks = stretch.steps.setdefault(Cursor(*line["at"]), {})
        ranks[head["rank"]] = np.array(line["samples"], dtype=np.int64)
