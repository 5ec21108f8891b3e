"""As Accelerate's documentation teaches it: prepare, backward, gather_for_metrics, save_state."""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    accelerator = Accelerator(cpu=True)
    set_seed(42)
    features = torch.randn(90, 6)
    labels = (features.sum(1) > 0).long()
    train_dataloader = DataLoader(TensorDataset(features[:64], labels[:64]), shuffle=True, batch_size=8)
    eval_dataloader = DataLoader(TensorDataset(features[64:], labels[64:]), batch_size=8)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model, optimizer, train_dataloader, eval_dataloader = accelerator.prepare(
        model, optimizer, train_dataloader, eval_dataloader
    )
    for _ in range(2):
        model.train()
        for inputs, targets in train_dataloader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
    model.eval()
    right = seen = 0
    for inputs, targets in eval_dataloader:
        with torch.no_grad():
            predictions = model(inputs).argmax(dim=-1)
        predictions, references = accelerator.gather_for_metrics((predictions, targets))
        right += (predictions == references).sum().item()
        seen += len(references)
    accelerator.wait_for_everyone()
    accelerator.save_state("state")
    loss = accelerator.reduce(loss.detach(), "mean")
    print(
        f"result rank {accelerator.process_index} of {accelerator.num_processes} loss {loss:.6f} right {right} of {seen}"
    )
    accelerator.end_training()


if __name__ == "__main__":
    main()
