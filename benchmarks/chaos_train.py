"""A training script that can be held to account: what its state and its samples must be at each step is a function of the step alone.

    python -m launcher … benchmarks/chaos_train.py DIRECTORY

Like a real one it all-reduces in each step, saves now and then, goes on from what was saved, and saves when it is told to stop. Its
arithmetic is exact, so that any step done twice, left out, or done from the wrong state shows in every state after it. Each rank writes
down what it takes before it takes part in the step, and the state after it; `chaos_audit` reads that.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from functools import lru_cache

DATASET_SIZE = 600
BATCH_SIZE = 12
SAVE_EVERY = 2
STEP_S = 0.02
_MODULUS = 2**61 - 1
_WRONG_RESUME = 99
"""Exit code of a rank that finds that ranks have begun from different states."""


@lru_cache(maxsize=4)
def order_of(epoch: int) -> tuple[int, ...]:
    """All samples of the epoch, in order."""
    samples = list(range(DATASET_SIZE))
    random.Random(f"epoch {epoch}").shuffle(samples)
    return tuple(samples)


def batch_of(step: int) -> tuple[int, ...]:
    """Samples of the step's global batch."""
    epoch, start = divmod(step * BATCH_SIZE, DATASET_SIZE)
    return order_of(epoch)[start : start + BATCH_SIZE]


def next_state(state: int, sample_sum: int) -> int:
    """The state after a step."""
    return (state * 48271 + sample_sum + 1) % _MODULUS


def states(num_steps: int) -> list[int]:
    """State before step 0, before step 1, …, after the last of `num_steps`."""
    found = [0]
    for step in range(num_steps):
        found.append(next_state(found[-1], sum(batch_of(step))))
    return found


def load(directory: str) -> tuple[int, int]:
    """The next step and the state, as saved."""
    try:
        with open(f"{directory}/saved") as file:
            saved = json.load(file)
    except FileNotFoundError:
        return 0, 0
    return saved["next_step"], saved["state"]


def save(directory: str, next_step: int, state: int) -> None:
    with open(f"{directory}/saved.part", "w") as file:
        json.dump({"next_step": next_step, "state": state}, file)
    os.replace(f"{directory}/saved.part", f"{directory}/saved")


def main() -> None:
    import torch
    import torch.distributed as dist

    from launcher import preemption

    directory = sys.argv[1]
    dist.init_process_group("gloo")
    rank, size, attempt = dist.get_rank(), dist.get_world_size(), int(os.environ["RAILHEAD_ATTEMPT"])
    step, state = load(directory)
    with open(f"{directory}/log/{attempt:05d}.{rank}", "w", buffering=1) as log:

        def write(what: str, **more: object) -> None:
            log.write(json.dumps({"what": what, "at": time.time(), "size": size, **more}) + "\n")

        ancestors, pid = [], os.getpid()
        while pid > 1:
            ancestors.append(pid)
            with open(f"/proc/{pid}/stat") as stat:
                pid = int(stat.read().rpartition(")")[2].split()[1])
        write("begin", step=step, state=state, pids=ancestors, port=int(os.environ["MASTER_PORT"]))
        while True:
            mine = batch_of(step)[rank::size]
            write("take", step=step, samples=mine)
            is_enough = os.path.exists(f"{directory}/enough")
            # Sum of samples; how many want to end; sums that are `size` times my own, if all have begun from the same state.
            total = torch.tensor([sum(mine), int(is_enough), step, state % 2**31])
            dist.all_reduce(total)
            if int(total[2]) != step * size or int(total[3]) != state % 2**31 * size:
                write("wrong", step=step)
                os._exit(_WRONG_RESUME)
            state = next_state(state, int(total[0]))
            write("done", step=step, state=state)
            step += 1
            is_over = int(total[1]) > 0
            is_told = preemption.requested(step)
            if rank == 0 and (step % SAVE_EVERY == 0 or is_told or is_over):
                save(directory, step, state)
                write("saved", step=step)
            if is_over:
                break
            if is_told:
                preemption.exit_saved()
            time.sleep(STEP_S)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
