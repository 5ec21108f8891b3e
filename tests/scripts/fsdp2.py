"""As PyTorch's FSDP2 tutorial teaches it: fully_shard over the default mesh, a state dict gathered at the end."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main():
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optim = torch.optim.Adam(model.parameters(), lr=1e-2)
    torch.manual_seed(dist.get_rank())
    for _ in range(5):
        loss = model(torch.randn(8, 16)).square().mean()
        loss.backward()
        optim.step()
        optim.zero_grad()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    total = sum(value.double().sum() for value in state.values()) if state else 0.0
    print(f"result rank {dist.get_rank()} loss {loss:.8f} keys {len(state)} weights {total:.8f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
