"""As the Transformers examples do it without the Trainer (run_clm_no_trainer.py): a causal LM, a scheduler, Accelerate, a saved model."""

import argparse
import math

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, default_data_collator, get_scheduler


def parse_args():
    parser = argparse.ArgumentParser(description="Finetune a transformers model on a causal language modeling task")
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--learning_rate", type=float, default=5e-3)
    parser.add_argument("--output_dir", default="clm")
    return parser.parse_args()


def main():
    args = parse_args()
    accelerator = Accelerator(cpu=True)
    set_seed(11)
    block = torch.arange(16) % 7
    data = [{"input_ids": (block + shift) % 7, "labels": (block + shift) % 7} for shift in range(24)]
    loader = DataLoader(
        data, shuffle=True, collate_fn=default_data_collator, batch_size=args.per_device_train_batch_size
    )
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=1, n_head=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)
    scheduler = get_scheduler("linear", optimizer=optimizer, num_warmup_steps=0, num_training_steps=2 * len(loader))
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    for _ in range(2):
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    losses = accelerator.gather(loss.detach().repeat(1))
    perplexity = math.exp(losses.mean().item())
    accelerator.wait_for_everyone()
    unwrapped = accelerator.unwrap_model(model)
    unwrapped.save_pretrained(
        args.output_dir, is_main_process=accelerator.is_main_process, save_function=accelerator.save
    )
    print(f"result rank {accelerator.process_index} of {accelerator.num_processes} perplexity {perplexity:.4f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
