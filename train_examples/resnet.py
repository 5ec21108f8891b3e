"""A ResNet on images in tar shards, with DistributedDataParallel. By default it learns scanned digits in a minute on
a laptop.

    python train_examples/prepare_digits.py --url file:///tmp/digits
    python train_examples/resnet.py --data file:///tmp/digits                               # alone
    torchrun --nproc-per-node 2 train_examples/resnet.py --data file:///tmp/digits
    python -m launcher --nproc-per-node 2 train_examples/resnet.py --data s3://bucket/digits

It resumes from the newest checkpoint in `--checkpoint-dir`, in mid-epoch, with the samples that come next, whatever
the number of ranks is now.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  its name everywhere
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, so that its siblings are found
from cache.client import Cache
from cache.client.datasets import ShardDataset
from cache.client.formats.tar import TarFormat
from cache.client.loader import ElasticLoader
from cache.client.sampler import ElasticBatchSampler
from train_examples.audit import AuditLog
from train_examples.common import Account, Checkpoints, World, join_world, leave_world, parallel, use_bf16

# Blocks of each stage; from 50 on they are bottlenecks (He et al., "Deep Residual Learning for Image Recognition", table 1).
STAGES = {
    10: (1, 1, 1, 1),
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="url with train/ and test/ shards, as prepare_digits.py writes them")
    add("--epochs", type=int, default=4)
    add("--max-steps", type=int, help="stop after so many steps of this start, without evaluation")
    add("--global-batch-size", type=int, default=128, help="over all ranks (default: %(default)s)")
    add("--lr", type=float, default=0.1, help="peak of a one-cycle schedule (default: %(default)s)")
    add("--depth", type=int, choices=STAGES, default=10)
    add("--width", type=int, default=16, help="channels of the first stage; 64 for a full-size ResNet")
    add("--num-classes", type=int, default=10)
    add("--image-size", type=int, default=8, help="images are resized to this; above 64, the stem is ImageNet's")
    add("--channels", type=int, choices=(1, 3), default=1)
    add("--shuffle", default="full", help="full, or windowed:W for data larger than the cache")
    add("--num-workers", type=int, default=0, help="DataLoader workers, for expensive decoding; reading needs none")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU that has it")
    add("--seed", type=int, default=0)
    add("--checkpoint-dir", help="where checkpoints are written and resumed from")
    add("--checkpoint-every", type=int, default=50, help="steps (default: %(default)s)")
    add("--log-every", type=int, default=20, help="steps (default: %(default)s)")
    add("--audit-dir", help="record which samples each step used; check with train_examples/audit.py")
    return parser.parse_args()


# --- model ----------------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two 3×3 convolutions, or the 1×1, 3×3, 1×1 bottleneck, around a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int, is_bottleneck: bool) -> None:
        super().__init__()
        channels_out = channels * 4 if is_bottleneck else channels
        shapes = (
            [(channels_in, channels, 1, 1), (channels, channels, 3, stride), (channels, channels_out, 1, 1)]
            if is_bottleneck
            else [(channels_in, channels, 3, stride), (channels, channels, 3, 1)]
        )
        self.convs = nn.ModuleList(conv(*shape) for shape in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(shape[1]) for shape in shapes)
        nn.init.zeros_(self.norms[-1].weight)  # every block begins as the identity
        self.shortcut = (
            nn.Sequential(conv(channels_in, channels_out, 1, stride), nn.BatchNorm2d(channels_out))
            if stride != 1 or channels_in != channels_out
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x
        for idx, (convolve, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(convolve(out))
            if idx < len(self.convs) - 1:
                out = F.relu(out)
        return F.relu(out + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self, depth: int, width: int, channels: int, num_classes: int, image_size: int) -> None:
        super().__init__()
        is_bottleneck = depth >= 50
        if image_size > 64:
            stem = [conv(channels, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
        else:  # small images keep their resolution
            stem = [conv(channels, width, 3, 1), nn.BatchNorm2d(width), nn.ReLU()]
        blocks: list[nn.Module] = []
        channels_in = width
        for stage_idx, num_blocks in enumerate(STAGES[depth]):
            for block_idx in range(num_blocks):
                stride = 2 if stage_idx > 0 and block_idx == 0 else 1
                blocks.append(Block(channels_in, width * 2**stage_idx, stride, is_bottleneck))
                channels_in = width * 2**stage_idx * (4 if is_bottleneck else 1)
        self.features = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels_in, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def conv(channels_in: int, channels_out: int, size: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)


def loss_of(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, world: World, bf16: bool) -> torch.Tensor:
    """Mean cross entropy of a batch of images, which come as bytes."""
    with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
        return F.cross_entropy(model(to_input(images, world.device)), labels.to(world.device, non_blocking=True))


# --- data -----------------------------------------------------------------------------------------------------------------------


class DecodeImage:
    """A raw sample to (image, label, number of the sample). A class, so that spawned workers can be given it."""

    def __init__(self, image_size: int, channels: int) -> None:
        self.size, self.mode = (image_size, image_size), "L" if channels == 1 else "RGB"

    def __call__(self, raw: dict[str, Any]) -> tuple[torch.Tensor, int, int]:
        name = next(name for name in ("png", "jpg", "jpeg", "webp") if name in raw)
        image = Image.open(io.BytesIO(raw[name])).convert(self.mode)
        if image.size != self.size:
            image = image.resize(self.size, Image.Resampling.BILINEAR)
        pixels = torch.from_numpy(np.array(image)).reshape(*self.size[::-1], -1).permute(2, 0, 1)
        return pixels, int(raw["cls"]), raw["__index__"]


def to_input(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Bytes to numbers around 0, on the device: a quarter of the bytes travel, and a batch is converted at once."""
    return pixels.to(device, non_blocking=True).float() / 127.5 - 1


def open_data(args: argparse.Namespace, world: World, cache: Cache) -> tuple[ShardDataset, ShardDataset, ElasticLoader]:
    """The training data, the data for testing, and the loader over this rank's part of the former."""
    decode = DecodeImage(args.image_size, args.channels)
    train = ShardDataset(cache, f"{args.data}/train", TarFormat(), decode)
    test = ShardDataset(cache, f"{args.data}/test", TarFormat(), decode)
    sampler = ElasticBatchSampler(
        train,
        args.global_batch_size,
        seed=args.seed,
        rank=world.rank,
        world_size=world.world_size,
        shuffle=args.shuffle,
    )
    loader = ElasticLoader(train, sampler, num_workers=args.num_workers, persistent_workers=args.num_workers > 0)
    return train, test, loader


@torch.no_grad()
def accuracy(model: nn.Module, test: ShardDataset, world: World, bf16: bool) -> float:
    """The share of test images that are classified rightly; each rank looks at its part of them."""
    model.eval()
    mine = Subset(test, range(world.rank, len(test), world.world_size))
    num_right = 0
    for images, labels, _ in DataLoader(mine, batch_size=256):
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            guesses = model(to_input(images, world.device)).argmax(dim=1)
        num_right += int((guesses == labels.to(world.device)).sum())
    model.train()
    (num_right_of_all,) = world.sum(num_right)
    return num_right_of_all / len(test)


# --- training -------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    world = join_world()
    torch.manual_seed(args.seed)  # every rank begins with the same weights
    bf16 = use_bf16(world, args.precision)

    cache = Cache()
    account = Account(world, cache)
    train, test, loader = open_data(args, world, cache)
    world.say(
        f"{len(train):,} training and {len(test):,} test images in {len(train.index.shards)} shards; {len(loader)} steps in an epoch"
    )
    account.say_how_warm(train)

    model: nn.Module = ResNet(args.depth, args.width, args.channels, args.num_classes, args.image_size).to(world.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    checkpoints = Checkpoints(world, args.checkpoint_dir)
    saved = checkpoints.load_newest()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        world.say(f"resumed at epoch {loader.epoch}, step {loader.step}")
    blank = torch.zeros(2, args.channels, args.image_size, args.image_size, dtype=torch.uint8)
    ddp = parallel(model, world, lambda ddp: loss_of(ddp, blank, torch.zeros(2, dtype=torch.long), world, bf16))
    audit = AuditLog(
        args.audit_dir,
        start_id=world.gather(time.time_ns())[0],
        rank=world.rank,
        world_size=world.world_size,
        num_samples=len(train),
        global_batch_size=args.global_batch_size,
        start_epoch=loader.epoch,
        start_step=loader.step,
    )

    def save() -> None:
        place = loader.state_dict()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": place}
        checkpoints.save(place["epoch"], place["step"], state)

    total_steps = args.epochs * len(loader)
    last_step = min(total_steps, loader.epoch * len(loader) + loader.step + (args.max_steps or total_steps))
    account.step_begins()
    while loader.epoch < args.epochs and loader.epoch * len(loader) + loader.step < last_step:
        for images, labels, samples in loader:
            epoch, step = loader.epoch, loader.step - 1
            done = epoch * len(loader) + step
            for group in optimizer.param_groups:
                group["lr"] = one_cycle(done / total_steps, args.lr)
            loss = loss_of(ddp, images, labels, world, bf16)
            if args.audit_dir:
                audit.record(epoch, step, samples.tolist(), loss.item())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            account.step_done(len(images))
            if done % args.log_every == 0 or done == total_steps - 1:
                (total_loss,) = world.sum(loss.item())
                world.say(f"epoch {epoch} step {step:>4}/{len(loader)}  loss {total_loss / world.world_size:.4f}")
            if loader.step % args.checkpoint_every == 0 or loader.step == len(loader):
                save()
            if done + 1 == last_step:
                break
        else:
            world.say(f"epoch {loader.epoch - 1} done  test accuracy {100 * accuracy(model, test, world, bf16):.2f} %")
            account.step_begins()

    if last_step == total_steps:
        world.say(f"final test accuracy {100 * accuracy(model, test, world, bf16):.2f} %")
    account.report(loader)
    audit.close()
    loader.close()
    cache.close()
    leave_world()


def one_cycle(progress: float, peak: float) -> float:
    """Up over the first fifth, down along a cosine: a function of progress alone, so that a resume continues it."""
    if progress < 0.2:
        return peak * (0.05 + 0.95 * progress / 0.2)
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


if __name__ == "__main__":
    main()
