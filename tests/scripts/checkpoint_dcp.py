"""As PyTorch's distributed-checkpoint recipe teaches it: a Stateful application state, saved by all ranks and loaded again."""

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel as DDP


class AppState(Stateful):
    def __init__(self, model, optimizer):
        self.model = model
        self.optimizer = optimizer

    def state_dict(self):
        model_state_dict, optimizer_state_dict = get_state_dict(self.model, self.optimizer)
        return {"model": model_state_dict, "optim": optimizer_state_dict}

    def load_state_dict(self, state_dict):
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state_dict["model"], optim_state_dict=state_dict["optim"]
        )


def build(seed):
    torch.manual_seed(seed)
    model = DDP(nn.Linear(8, 4))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def main():
    dist.init_process_group("gloo")
    model, optimizer = build(0)
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    dcp.save({"app": AppState(model, optimizer)}, checkpoint_id="checkpoint")
    other, other_optimizer = build(1)
    dcp.load({"app": AppState(other, other_optimizer)}, checkpoint_id="checkpoint")
    same = all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters()))
    print(f"result rank {dist.get_rank()} same {same} weights {sum(p.sum() for p in other.parameters()):.8f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
