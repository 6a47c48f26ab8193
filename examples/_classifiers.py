"""The demo's classifier of cell types, trained twice: by a plain loop on the op, and under a Lightning ``Trainer``."""

from __future__ import annotations

import logging
import sys
import time
import warnings

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from tqdm import tqdm

import annbatch
from annbatch import DatasetCollection
from annbatch.lightning import AnnbatchDataModule
from annbatch.nn import CSRLinear

EPOCHS, BATCH_SIZE, LEARNING_RATE = 30, 56, 0.002
WINDOW = {"chunk_size": 16, "preload_nchunks": 14, "batch_size": BATCH_SIZE}
PLAIN_BAR = {"ascii": True, "file": sys.stdout, "mininterval": 0.5, "ncols": 100}


class Curve:
    """Loss on training cells and accuracy on held-out cells, by epoch, with the seconds since training began."""

    def __init__(self, name: str):
        self.name = name
        self.seconds, self.loss, self.accuracy = [], [], []
        self._begin = time.perf_counter()
        self._bar = tqdm(total=EPOCHS, desc=name, unit=" epochs", **PLAIN_BAR)

    def add(self, loss: float, accuracy: float) -> None:
        """Note and show an epoch that has just ended."""
        self.seconds.append(time.perf_counter() - self._begin)
        self.loss.append(loss)
        self.accuracy.append(accuracy)
        self._bar.set_postfix(loss=f"{loss:.3f}", held_out=f"{accuracy:.1%}", refresh=False)
        self._bar.update()
        if len(self.loss) == EPOCHS:
            self._bar.close()


# ------------------------------------------------------------------------------------------- a plain loop on the op


def batches(state: torch.Tensor, epoch: int):
    """Yield ``(rows, csr)`` until the batch without rows, which is the end of the epoch."""
    torch.ops.annbatch.start(state, epoch)
    while True:
        rows, *csr = torch.ops.annbatch.load(state)
        if rows.numel() == 0:
            return
        yield rows, csr


def train_on_the_op(paths: list[str], labels: torch.Tensor, n_var: int, n_train: int) -> Curve:
    """Train on rows ``[0, n_train)`` and test on the rest, with no more than the op and torch.

    Parameters
    ----------
    paths
        The datasets, in order.
    labels
        Cell types as numbers, int64 [n_obs].
    n_var
        Number of genes.
    n_train
        Number of rows to learn from.
    """
    data = {"elements": [{"name": "X"}], "datasets": [{"path": path} for path in paths]}
    train = annbatch.open_state({**data, "sampling": {"kind": "random", "mask": [0, n_train], **WINDOW}})
    held_out = annbatch.open_state(
        {**data, "sampling": {"kind": "sequential", "mask": [n_train, len(labels)], **WINDOW}}
    )
    torch.manual_seed(0)
    model = CSRLinear(n_var, int(labels.max()) + 1)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    curve = Curve("plain torch loop")
    for epoch in range(EPOCHS):
        losses = []
        for rows, csr in batches(train, epoch):
            loss = F.cross_entropy(model(csr), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            n_right = sum((model(csr).argmax(1) == labels[rows]).sum().item() for rows, csr in batches(held_out, 0))
        curve.add(sum(losses) / len(losses), n_right / (len(labels) - n_train))
    torch.ops.annbatch.close(train)
    torch.ops.annbatch.close(held_out)
    return curve


# ----------------------------------------------------------------------------------------- the same through Lightning


class CellTypes(pl.LightningModule):
    """A linear classifier of cell types over CSR batches."""

    def __init__(self, n_var: int, n_types: int):
        super().__init__()
        self.layer = CSRLinear(n_var, n_types)
        self.curve = Curve("Lightning")

    def _step(self, batch, name: str) -> torch.Tensor:
        scores, labels = self.layer(batch["X"]), batch["obs"]["bulk_labels"]
        loss = F.cross_entropy(scores, labels)
        accuracy = (scores.argmax(1) == labels).float().mean()
        metrics = {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=len(labels))
        return loss

    def training_step(self, batch, _):
        """Return the loss of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch, _):
        """Log loss and accuracy of a held-out batch."""
        self._step(batch, "val")

    def on_train_epoch_end(self):
        """Note the epoch; its validation came before this."""
        metrics = self.trainer.callback_metrics
        self.curve.add(metrics["train_loss"].item(), metrics["val_accuracy"].item())

    def configure_optimizers(self):
        """Return the optimizer that the plain loop uses."""
        return torch.optim.Adam(self.parameters(), LEARNING_RATE)


def train_with_lightning(collection: DatasetCollection, labels: torch.Tensor, n_var: int, n_train: int) -> Curve:
    """Train the same model on the same rows under a Trainer; arguments as for :func:`train_on_the_op`."""
    split = {"train": slice(0, n_train), "val": slice(n_train, len(labels))}
    # obs="codes": the types come as numbers too, not necessarily the same ones as in `labels`.
    data = AnnbatchDataModule(collection, split=split, obs_columns=["bulk_labels"], obs="codes", **WINDOW)
    torch.manual_seed(0)
    model = CellTypes(n_var, int(labels.max()) + 1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on workers, loggers and checkpoints, none of which the demo needs
        trainer = pl.Trainer(
            max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(model, datamodule=data)
    return model.curve
