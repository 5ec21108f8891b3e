"""A program ends although torch joins gloo's threads with the GIL in its hand."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launcher.launched import launch

ENDS_RIGHT_AFTER_A_COLLECTIVE = """
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def train():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model = DistributedDataParallel(torch.nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()

for _ in range(300):
    train()
print("ended 300 times")
"""


@pytest.fixture
def busy_cores() -> Iterator[None]:
    """Gloo's threads seldom have a core when they want one."""
    spin = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(3)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.usefixtures("busy_cores")
def test_a_program_that_ends_right_after_a_collective_ends(tmp_path: Path) -> None:
    """Without us, under torchrun or by hand, one of a few hundred such ends takes for ever on busy cores (torch 2.13): each time in
    three tries of this very program."""
    with launch(tmp_path, ENDS_RIGHT_AFTER_A_COLLECTIVE, "--nproc-per-node", "1") as launched:
        code, out, err = launched.finish(100)
    assert code == 0, err
    assert "ended 300 times" in out
