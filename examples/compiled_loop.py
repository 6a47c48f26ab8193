"""The load inside of ``torch.compile(fullgraph=True)``: one graph from the files to the loss.

The end of an epoch is a batch without rows. Whether a tensor is empty cannot be asked within a graph, so the loop
counts batches instead, and lets the graph run on full ones only.
"""

import tempfile

import torch
import torch.nn.functional as F

import annbatch
from _cells import small_collection
from annbatch.nn import CSRLinear

EPOCHS, BATCH_SIZE = 4, 128

with tempfile.TemporaryDirectory() as folder:
    collection = small_collection(folder)
    codes = collection.obs(["cell_type"])["cell_type"].cat.codes
    labels = torch.tensor(codes.to_numpy(), dtype=torch.int64)
    state = annbatch.open_state(
        {
            "elements": [{"name": "X"}],
            "datasets": [{"path": f"{folder}/cells.zarr/{group.basename}"} for group in collection],
            "sampling": {
                "kind": "random",
                "chunk_size": 16,
                "preload_nchunks": 64,
                "batch_size": BATCH_SIZE,
                "drop_last": True,
            },
        }
    )
    n_batches = len(labels) // BATCH_SIZE
    model = CSRLinear(200, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)

    @torch.compile(fullgraph=True)
    def next_loss(state: torch.Tensor) -> torch.Tensor:
        """Load a batch and return its loss."""
        rows, *csr = torch.ops.annbatch.load(state)
        return F.cross_entropy(model(csr), labels[rows])

    for epoch in range(EPOCHS):
        torch.ops.annbatch.start(state, epoch)  # the order of an epoch is a function of this number
        losses = []
        for _ in range(n_batches):
            loss = next_loss(state)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert torch.ops.annbatch.load(state)[0].numel() == 0  # the end of the epoch
        print(f"epoch {epoch}: mean loss {sum(losses) / n_batches:.3f}")
    torch.ops.annbatch.close(state)
