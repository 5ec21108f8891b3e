"""As PyTorch's ImageNet example does it: DataLoader workers, metrics reduced over ranks, validation by rank 0, best model copied."""

import os
import shutil

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Subset, TensorDataset
from torch.utils.data.distributed import DistributedSampler


class AverageMeter:
    def __init__(self):
        self.sum, self.count = 0.0, 0

    def update(self, value, count=1):
        self.sum += value * count
        self.count += count

    def all_reduce(self):
        total = torch.tensor([self.sum, self.count], dtype=torch.float64)
        dist.all_reduce(total, dist.ReduceOp.SUM, async_op=False)
        self.sum, self.count = total.tolist()

    @property
    def avg(self):
        return self.sum / self.count


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean().item() * 100.0


def main():
    dist.init_process_group(backend="gloo", init_method="env://")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 4, (160,), generator=generator)
    images = torch.rand(160, 3, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1) * 0.3
    dataset = TensorDataset(images, labels)
    train_dataset, val_dataset = Subset(dataset, range(128)), Subset(dataset, range(128, 160))
    sampler = DistributedSampler(train_dataset, seed=5)
    train_loader = DataLoader(train_dataset, 16, sampler=sampler, num_workers=1, persistent_workers=True)
    val_loader = DataLoader(val_dataset, 16, sampler=DistributedSampler(val_dataset, shuffle=False, drop_last=True))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4))
    model = DistributedDataParallel(model)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    scheduler = StepLR(optimizer, step_size=1, gamma=0.5)
    best = 0.0
    for epoch in range(2):
        sampler.set_epoch(epoch)
        model.train()
        for inputs, target in train_loader:
            loss = criterion(model(inputs), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        top1 = AverageMeter()
        with torch.no_grad():
            for inputs, target in val_loader:
                top1.update(accuracy(model(inputs), target), len(inputs))
        top1.all_reduce()
        scheduler.step()
        is_best, best = top1.avg > best, max(top1.avg, best)
        if rank == 0:
            torch.save({"epoch": epoch + 1, "state_dict": model.state_dict()}, "checkpoint.pth.tar")
            if is_best:
                shutil.copyfile("checkpoint.pth.tar", "model_best.pth.tar")
        print(f"result rank {rank} epoch {epoch} loss {loss:.8f} acc {top1.avg:.4f}")
    dist.barrier()
    print(f"result rank {rank} best is kept {os.path.exists('model_best.pth.tar')}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
