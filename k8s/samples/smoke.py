"""Do all ranks reach each other, and does each find the cache of its node?"""

import os

import torch
import torch.distributed as dist

from cache.client import Cache

dist.init_process_group("gloo")
total = torch.tensor([1.0])
dist.all_reduce(total)
with Cache() as cache:
    account = cache.daemon_status()
found = f"cache at {account['dir']}" if account else "no cache"
print(f"rank {dist.get_rank()} of {int(total.item())} on {os.uname().nodename}: {found}", flush=True)
dist.destroy_process_group()
