"""As the multiprocessing notes teach it: spawned DataLoader workers, a pool under a forkserver, a class of __main__ that is pickled."""

import multiprocessing as mp
import os

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset


class Squares(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return index * index


def cube(number):
    return number**3


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    loader = DataLoader(Squares(), batch_size=4, num_workers=1, multiprocessing_context="spawn")
    squares = sum(int(batch.sum()) for batch in loader)
    with mp.get_context("forkserver").Pool(1) as pool:
        cubes = pool.map(cube, range(rank, rank + 4))
    total = torch.tensor([squares + sum(cubes)])
    dist.all_reduce(total)
    print(f"result rank {rank} squares {squares} cubes {cubes} total {total.item()} file {os.path.basename(__file__)}")
    dist.destroy_process_group()
