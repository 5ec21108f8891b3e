"""Do all ranks reach each other, does each find the cache of its node, and does an object come through it?

smoke.py [URL [NOTE]]
"""

import os
import sys

import torch
import torch.distributed as dist

from cache.client import Cache

dist.init_process_group("gloo")
cache = Cache()
num_bytes = 0
if len(sys.argv) > 1:
    with cache.open(sys.argv[1]) as shard:
        num_bytes = len(shard.read(0, shard.size))
account = cache.daemon_status()
total = torch.tensor([1.0, float(num_bytes)])
dist.all_reduce(total)
dist.destroy_process_group()

where = f"cache at {account['socket']}" if account else "no cache"
read = f"{num_bytes} bytes read, {int(total[1].item())} by all" if num_bytes else "nothing read"
rank, note = os.environ["RANK"], " ".join(sys.argv[2:])
print(f"rank {rank} of {int(total[0].item())}: {where}, {read} {note}".rstrip(), flush=True)
