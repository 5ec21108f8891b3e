"""As Lightning Fabric's documentation teaches it: five changed lines in an ordinary loop."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    fabric = L.Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    fabric.seed_everything(3, verbose=False)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model, optimizer = fabric.setup(model, optimizer)
    features = torch.randn(32, 4)
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(features, features.sum(1, keepdim=True)), batch_size=4))
    for _ in range(3):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(inputs), targets)
            fabric.backward(loss)
            optimizer.step()
    mean = fabric.all_reduce(loss.detach(), reduce_op="mean")
    fabric.save("fabric.ckpt", {"model": model})
    print(f"result rank {fabric.global_rank} of {fabric.world_size} loss {mean:.8f}")


if __name__ == "__main__":
    main()
