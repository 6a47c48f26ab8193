"""A Lightning ``Trainer`` over a collection, with no donor in two splits.

The same module serves several processes: `Trainer(devices=2, strategy="ddp")` gives each rank its own share of rows
and as many batches as the others.
"""

import tempfile

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from _cells import small_collection
from annbatch.lightning import AnnbatchDataModule
from annbatch.nn import CSRLinear


class CellTypes(pl.LightningModule):
    """A linear classifier of cell types."""

    def __init__(self, n_var: int, n_types: int):
        super().__init__()
        self.layer = CSRLinear(n_var, n_types)

    def step(self, batch, name: str):
        """Log loss and accuracy; return the loss."""
        scores, labels = self.layer(batch["X"]), batch["obs"]["cell_type"]
        loss = F.cross_entropy(scores, labels)
        accuracy = (scores.argmax(1) == labels).float().mean()
        # batch_size: Lightning cannot guess it from dictionaries that hold more than tensors
        self.log_dict({f"{name}_loss": loss, f"{name}_accuracy": accuracy}, batch_size=len(labels), sync_dist=True)
        return loss

    def training_step(self, batch, _):
        """Return the loss of a batch of training cells."""
        return self.step(batch, "train")

    def validation_step(self, batch, _):
        """Log a batch of validation cells."""
        self.step(batch, "val")

    def test_step(self, batch, _):
        """Log a batch of test cells."""
        self.step(batch, "test")

    def configure_optimizers(self):
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), 0.01)


with tempfile.TemporaryDirectory() as folder:
    data = AnnbatchDataModule(
        small_collection(folder),
        split=(0.7, 0.15, 0.15),
        split_by="donor",
        batch_size=128,
        chunk_size=16,
        preload_nchunks=64,
        obs_columns=["cell_type"],
        obs="codes",  # tensors of category codes instead of data frames
        stage_options={"val": {"batch_size": 512}, "test": {"batch_size": 512}},
    )
    for name in ("train", "val", "test"):
        print(f"{name}: {len(data.rows(name))} cells")
    model = CellTypes(n_var=200, n_types=4)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data)
    (metrics,) = trainer.test(model, datamodule=data, verbose=False)
    print(f"test accuracy {metrics['test_accuracy']:.1%}")
