"""A small GPT on token shards, with DistributedDataParallel. By default it learns to write Python, byte by byte, in a
minute on a laptop.

    python train_examples/prepare_text.py --url file:///tmp/text
    python train_examples/gpt.py --data file:///tmp/text                               # alone
    torchrun --nproc-per-node 2 train_examples/gpt.py --data file:///tmp/text
    python -m launcher --nproc-per-node 2 train_examples/gpt.py --data s3://bucket/text

GPT-2's size is `--layers 12 --heads 12 --embedding 768 --seq-len 1024 --vocab-size 50304` on shards of its tokens. It
resumes from the newest checkpoint in `--checkpoint-dir`, at the very window where it stopped, whatever the number of
ranks is now.

Letters in the names of tensors: B batch, T time (tokens of a window), H heads, D channels.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  its name everywhere
from torch import nn
from torch.utils.data import DataLoader, Subset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, so that its siblings are found
from cache.client import Cache
from cache.client.datasets import TokenDataset, window_to_tensors
from cache.client.loader import ElasticLoader
from cache.client.sampler import ElasticBatchSampler
from train_examples.audit import AuditLog
from train_examples.common import Account, Checkpoints, World, join_world, leave_world, parallel, use_bf16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="url with train/ and val/ shards, as prepare_text.py writes them")
    add("--steps", type=int, default=300, help="optimizer steps of the whole job (default: %(default)s)")
    add("--max-steps", type=int, help="stop after so many steps of this start, without evaluation")
    add("--global-batch-size", type=int, default=16, help="windows, over all ranks (default: %(default)s)")
    add("--lr", type=float, default=3e-3, help="peak; warm-up, then a cosine down to a tenth (default: %(default)s)")
    add("--layers", type=int, default=3)
    add("--heads", type=int, default=4)
    add("--embedding", type=int, default=96, help="channels of the residual stream")
    add("--seq-len", type=int, default=128, help="tokens of a window")
    add("--vocab-size", type=int, default=256, help="256: a token is a byte")
    add("--shuffle", default="full", help="full, or windowed:W for data larger than the cache")
    add("--num-workers", type=int, default=0, help="DataLoader workers; reading needs none")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU that has it")
    add("--seed", type=int, default=0)
    add("--eval-windows", type=int, default=256, help="windows of val/ that are evaluated (default: %(default)s)")
    add("--checkpoint-dir", help="where checkpoints are written and resumed from")
    add("--checkpoint-every", type=int, default=50, help="steps (default: %(default)s)")
    add("--log-every", type=int, default=20, help="steps (default: %(default)s)")
    add("--audit-dir", help="record which windows each step used; check with train_examples/audit.py")
    return parser.parse_args()


# --- model ----------------------------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Attention, then a perceptron, each added to the residual stream."""

    def __init__(self, embedding: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(embedding)
        self.qkv = nn.Linear(embedding, 3 * embedding)
        self.project = nn.Linear(embedding, embedding)
        self.mlp_norm = nn.LayerNorm(embedding)
        self.mlp = nn.Sequential(
            nn.Linear(embedding, 4 * embedding), nn.GELU(approximate="tanh"), nn.Linear(4 * embedding, embedding)
        )

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:  # noqa: N803
        q_BHTD, k_BHTD, v_BHTD = (  # noqa: N806
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(x_BTD)).chunk(3, dim=-1)
        )
        mixed_BHTD = F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)  # noqa: N806
        x_BTD = x_BTD + self.project(mixed_BHTD.transpose(1, 2).flatten(2))  # noqa: N806
        return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class GPT(nn.Module):
    def __init__(self, vocab_size: int, seq_len: int, layers: int, heads: int, embedding: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, embedding)
        self.places = nn.Embedding(seq_len, embedding)
        self.layers = nn.Sequential(*(Layer(embedding, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(embedding)
        self.head = nn.Linear(embedding, vocab_size, bias=False)
        self.head.weight = self.tokens.weight  # tied, as in GPT-2
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                # What adds to the residual stream begins smaller, by the number of additions (GPT-2, section 2.3).
                is_residual = name.endswith(("project.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if is_residual else 0.02)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:  # noqa: N803
        places_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)  # noqa: N806
        return self.head(self.norm(self.layers(self.tokens(tokens_BT) + self.places(places_T))))


def loss_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, world: World, bf16: bool) -> torch.Tensor:
    """Mean cross entropy in nats per token."""
    with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
        logits = model(inputs.to(world.device, non_blocking=True))
        return F.cross_entropy(logits.flatten(0, 1), targets.to(world.device, non_blocking=True).flatten())


# --- data -----------------------------------------------------------------------------------------------------------------------


def decode_window(raw: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(inputs, targets, number of the window)."""
    return *window_to_tensors(raw), raw["__index__"]


def open_data(args: argparse.Namespace, world: World, cache: Cache) -> tuple[TokenDataset, TokenDataset, ElasticLoader]:
    """The training data, the data for evaluation, and the loader over this rank's part of the former."""
    train = TokenDataset(cache, f"{args.data}/train", args.seq_len, decode_window)
    val = TokenDataset(cache, f"{args.data}/val", args.seq_len, decode_window)
    sampler = ElasticBatchSampler(
        train,
        args.global_batch_size,
        seed=args.seed,
        rank=world.rank,
        world_size=world.world_size,
        shuffle=args.shuffle,
    )
    loader = ElasticLoader(train, sampler, num_workers=args.num_workers, persistent_workers=args.num_workers > 0)
    return train, val, loader


@torch.no_grad()
def bits_per_token(model: nn.Module, val: TokenDataset, num_windows: int, world: World, bf16: bool) -> float:
    """Cross entropy over windows spread through the evaluation text; with bytes for tokens, bits per byte."""
    model.eval()
    num_windows = min(num_windows, len(val))
    spread = [idx * len(val) // num_windows for idx in range(num_windows)]
    total = num_seen = 0.0
    for inputs, targets, _ in DataLoader(Subset(val, spread[world.rank :: world.world_size]), batch_size=16):
        total += loss_of(model, inputs, targets, world, bf16).item() * len(inputs)
        num_seen += len(inputs)
    model.train()
    total, num_seen = world.sum(total, num_seen)
    return total / num_seen / math.log(2)


# --- training -------------------------------------------------------------------------------------------------------------------


def main() -> None:
    args = arguments()
    world = join_world()
    torch.manual_seed(args.seed)  # every rank begins with the same weights
    bf16 = use_bf16(world, args.precision)

    cache = Cache()
    account = Account(world, cache)
    train, val, loader = open_data(args, world, cache)
    world.say(
        f"{len(train):,} training windows of {args.seq_len} tokens in {len(train.index.shards)} shards; {len(loader):,} steps in an epoch"
    )
    account.say_how_warm(train)

    model: nn.Module = GPT(args.vocab_size, args.seq_len, args.layers, args.heads, args.embedding).to(world.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.1)
    checkpoints = Checkpoints(world, args.checkpoint_dir)
    saved = checkpoints.load_newest()
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        loader.load_state_dict(saved["loader"])
        world.say(f"resumed at epoch {loader.epoch}, step {loader.step}")
    blank = torch.zeros(1, args.seq_len, dtype=torch.long)
    ddp = parallel(model, world, lambda ddp: loss_of(ddp, blank, blank, world, bf16))
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

    done = loader.epoch * len(loader) + loader.step
    last_step = min(args.steps, done + (args.max_steps or args.steps))
    account.step_begins()
    while done < last_step:
        for inputs, targets, samples in loader:
            epoch, step = loader.epoch, loader.step - 1
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm_up_and_cosine(done / args.steps)
            loss = loss_of(ddp, inputs, targets, world, bf16)
            if args.audit_dir:
                audit.record(epoch, step, samples.tolist(), loss.item())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            done += 1
            account.step_done(len(inputs))
            if (done - 1) % args.log_every == 0 or done == args.steps:
                (total_loss,) = world.sum(loss.item())
                world.say(f"step {done - 1:>5}/{args.steps}  loss {total_loss / world.world_size:.4f}")
            if done % args.checkpoint_every == 0 or done == args.steps:
                place = loader.state_dict()
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "loader": place}
                checkpoints.save(place["epoch"], place["step"], state)
            if done == last_step:
                break

    if last_step == args.steps:
        bits = bits_per_token(model, val, args.eval_windows, world, bf16)
        world.say(f"evaluation: {bits:.3f} bits per {'byte' if args.vocab_size == 256 else 'token'}")
    account.report(loader)
    audit.close()
    loader.close()
    cache.close()
    leave_world()


def warm_up_and_cosine(progress: float) -> float:
    """Share of the peak learning rate: a function of progress alone, so that a resume continues it."""
    if progress < 0.05:
        return (progress + 0.001) / 0.051
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (progress - 0.05) / 0.95))


if __name__ == "__main__":
    main()
