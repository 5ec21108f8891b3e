"""As torchrun's documentation asks for it: @record on main, which reads the variables that torchrun sets."""

import os
import socket

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record


@record
def main():
    dist.init_process_group(backend="gloo")
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"]
    assert os.environ["MASTER_ADDR"] and int(os.environ["MASTER_PORT"]) > 0
    assert int(os.environ["TORCHELASTIC_RESTART_COUNT"]) == 0
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, {"host": socket.gethostname(), "rank": dist.get_rank()})
    tensor = torch.ones(1) * (dist.get_rank() + 1)
    dist.all_reduce(tensor)
    values = " ".join(f"{name}={os.environ[name]}" for name in names)
    print(f"result {values} sum {tensor.item()} ranks {[item['rank'] for item in gathered]}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
