"""As the Transformers documentation teaches it: Trainer with TrainingArguments, on a small BERT made from a configuration."""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed


class Sentences(torch.utils.data.Dataset):
    def __len__(self):
        return 48

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(5, 60, (12,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": int(ids.sum() % 2)}


def compute_metrics(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main():
    set_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    arguments = TrainingArguments(
        output_dir="hf",
        use_cpu=True,
        ddp_backend="gloo",
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        num_train_epochs=1,
        logging_steps=100,
        report_to="none",
        disable_tqdm=True,
        save_strategy="epoch",
    )
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=arguments,
        train_dataset=Sentences(),
        eval_dataset=Sentences(),
        compute_metrics=compute_metrics,
    )
    outcome = trainer.train()
    found = trainer.evaluate()
    print(
        f"result rank {arguments.process_index} of {arguments.world_size} steps {outcome.global_step} "
        f"loss {outcome.training_loss:.5f} eval {found['eval_loss']:.5f} accuracy {found['eval_accuracy']:.4f}"
    )


if __name__ == "__main__":
    main()
