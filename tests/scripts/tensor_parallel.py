"""As PyTorch's tensor-parallel tutorial teaches it: a device mesh, parallelize_module with a plan."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module


class ToyModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.in_proj = nn.Linear(10, 32)
        self.relu = nn.ReLU()
        self.out_proj = nn.Linear(32, 5)

    def forward(self, x):
        return self.out_proj(self.relu(self.in_proj(x)))


if __name__ == "__main__":
    device_mesh = init_device_mesh(device_type="cpu", mesh_shape=(int(os.environ["WORLD_SIZE"]),))
    torch.manual_seed(0)
    tp_model = ToyModel()
    tp_model = parallelize_module(
        module=tp_model,
        device_mesh=device_mesh,
        parallelize_plan={"in_proj": ColwiseParallel(), "out_proj": RowwiseParallel()},
    )
    optimizer = torch.optim.AdamW(tp_model.parameters(), lr=0.25, foreach=False)
    for i in range(5):
        torch.manual_seed(i)
        output = tp_model(torch.rand(20, 10))
        output.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"result rank {device_mesh.get_rank()} output {output.sum():.6f}")
    dist.destroy_process_group()
