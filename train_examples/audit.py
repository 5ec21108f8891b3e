"""Was every sample trained on exactly once in each epoch, through failures and resizing?

    python train_examples/audit.py DIR

Each start of a training script with `--audit-dir DIR` adds one file per rank. A line is written when a rank has
computed a step's loss, before it takes part in the gradient's sum: if any rank finished a step, every rank has
written it. A start that resumed from a checkpoint makes void what earlier starts did after that checkpoint; what is
left is the history of the model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class AuditLog:
    """One rank's records. With `directory` None it does nothing."""

    def __init__(self, directory: str | None, *, start_id: int, rank: int, **header: Any) -> None:
        self._file = None
        if directory is not None:
            Path(directory).mkdir(parents=True, exist_ok=True)
            path = Path(directory) / f"{start_id:020}-rank{rank:05}.jsonl"
            self._file = path.open("w", buffering=1)  # line by line: a killed rank leaves whole lines
            self._file.write(json.dumps({"start_id": start_id, "rank": rank, "pid": os.getpid(), **header}) + "\n")

    def record(self, epoch: int, step: int, samples: list[int], loss: float) -> None:
        if self._file is not None:
            self._file.write(json.dumps({"epoch": epoch, "step": step, "samples": samples, "loss": loss.hex()}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass
class Step:
    """What all ranks of one start recorded of one step."""

    world_size: int
    samples: dict[int, list[int]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def is_whole(self) -> bool:
        return len(self.samples) == self.world_size


@dataclass
class History:
    """The steps that made the model: (epoch, step) → what was trained on."""

    header: dict[str, Any]
    steps: dict[tuple[int, int], Step]
    num_void: int
    """Steps that were done again after a resume."""


def read_history(directory: Path) -> History:
    """All records of a directory, without what later starts made void. ValueError if there are none, or of different
    data sets."""
    starts: dict[int, dict[tuple[int, int], Step]] = {}
    headers: dict[int, dict[str, Any]] = {}
    for path in sorted(directory.glob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if not lines:
            continue
        header = headers.setdefault(lines[0]["start_id"], lines[0])
        steps = starts.setdefault(header["start_id"], {})
        for line in lines[1:]:
            step = steps.setdefault((line["epoch"], line["step"]), Step(header["world_size"]))
            step.samples[lines[0]["rank"]] = line["samples"]
            step.losses[lines[0]["rank"]] = float.fromhex(line["loss"])
    if not starts:
        raise ValueError(f"{directory} holds no records; train with --audit-dir {directory}")
    history: dict[tuple[int, int], Step] = {}
    num_void = 0
    for start_id in sorted(starts):
        header = headers[start_id]
        if any(header[key] != headers[min(starts)][key] for key in ("num_samples", "global_batch_size")):
            raise ValueError(
                f"{directory} holds records of different data sets or batch sizes; use a directory for each"
            )
        begin = (header["start_epoch"], header["start_step"])
        kept = {place: step for place, step in history.items() if place < begin}
        num_void += len(history) - len(kept)
        history = kept | starts[start_id]
    return History(headers[max(starts)], history, num_void)


def findings(history: History) -> list[str]:
    """What is wrong, one sentence each; empty if every sample of every finished epoch was trained on exactly once."""
    wrong = []
    num_samples, batch = history.header["num_samples"], history.header["global_batch_size"]
    num_steps = num_samples // batch
    last = max(history.steps)
    for epoch in range(last[0] + 1):
        steps = {step: found for (e, step), found in history.steps.items() if e == epoch}
        expected = range(num_steps if epoch < last[0] else last[1] + 1)
        missing = [step for step in expected if step not in steps]
        torn = [step for step in expected if step in steps and not steps[step].is_whole and (epoch, step) != last]
        if missing:
            wrong.append(f"epoch {epoch}: {len(missing)} steps are missing, the first is {missing[0]}")
        if torn:
            wrong.append(f"epoch {epoch}: {len(torn)} steps lack the records of some ranks, the first is {torn[0]}")
        seen = Counter(s for step in steps.values() for part in step.samples.values() for s in part)
        twice = sorted(sample for sample, count in seen.items() if count > 1)
        if twice:
            wrong.append(f"epoch {epoch}: {len(twice)} samples were trained on more than once, the first is {twice[0]}")
        wrong += [
            f"epoch {epoch}, step {step}: {size} samples instead of {batch}"
            for step, found in steps.items()
            if found.is_whole and (size := sum(map(len, found.samples.values()))) != batch
        ]
        outside = [sample for sample in seen if not 0 <= sample < num_samples]
        if outside:
            wrong.append(f"epoch {epoch}: sample {outside[0]} of a data set of {num_samples}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    try:
        history = read_history(args.directory)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    wrong = findings(history)
    num_samples, batch = history.header["num_samples"], history.header["global_batch_size"]
    epochs = sorted({epoch for epoch, _ in history.steps})
    for epoch in epochs:
        steps = [step for (e, _), step in history.steps.items() if e == epoch]
        seen = {sample for step in steps for part in step.samples.values() for sample in part}
        sizes = sorted({step.world_size for step in steps})
        print(
            f"epoch {epoch}: {len(steps)} of {num_samples // batch} steps, {len(seen):,} of {num_samples:,} samples, "
            f"{num_samples % batch} left out by drop_last, by {' and '.join(map(str, sizes))} ranks"
        )
    print(f"{history.num_void} steps were done again after a resume")
    for finding in wrong:
        print(f"WRONG: {finding}")
    last_epoch, last_step = max(history.steps)
    open_epoch = (
        "" if last_step + 1 == num_samples // batch else f"; epoch {last_epoch} ends after step {last_step}, unfinished"
    )
    print(
        f"{len(wrong)} findings"
        if wrong
        else f"no sample twice in an epoch, none missing in a finished one{open_epoch}"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
