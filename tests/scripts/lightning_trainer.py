"""As Lightning's documentation teaches it: a LightningModule, a DataModule's loaders, Trainer with strategy="ddp" started by torchrun."""

import logging
import warnings

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class LitModel(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        loss = nn.functional.cross_entropy(self.layer(inputs), targets)
        self.log("train_loss", loss, sync_dist=True)
        return loss

    def validation_step(self, batch, batch_idx):
        inputs, targets = batch
        self.log("val_loss", nn.functional.cross_entropy(self.layer(inputs), targets), sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main():
    L.seed_everything(1, verbose=False)
    features = torch.randn(64, 8)
    dataset = TensorDataset(features, (features.sum(1) > 0).long())
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir="lightning",
    )
    model = LitModel()
    trainer.fit(model, DataLoader(dataset, batch_size=8), DataLoader(dataset, batch_size=8))
    loss = trainer.callback_metrics["val_loss"]
    print(f"result rank {trainer.global_rank} of {trainer.world_size} steps {trainer.global_step} val_loss {loss:.6f}")


if __name__ == "__main__":
    main()
