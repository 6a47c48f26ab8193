"""A plain torch training loop over a collection: the Loader gives dictionaries with CSR tensors and obs."""

import tempfile

import numpy as np
import torch
import torch.nn.functional as F

from _cells import small_collection
from annbatch import Loader
from annbatch.nn import CSRLinear

with tempfile.TemporaryDirectory() as folder:
    loader = Loader(
        shuffle=True,
        rng=np.random.default_rng(0),
        chunk_size=16,  # cells read contiguously: larger is faster, smaller shuffles better
        preload_nchunks=64,  # chunks that are shuffled together
        batch_size=128,
        to="torch",
        obs_columns=["cell_type"],  # other columns are not even read
    ).use_collection(small_collection(folder))
    print(f"{loader.n_obs} cells of {loader.n_var} genes, {len(loader)} batches per epoch")

    model = CSRLinear(loader.n_var, 4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for epoch in range(5):
        right = 0
        for batch in loader:
            labels = torch.as_tensor(batch["obs"]["cell_type"].cat.codes.to_numpy(np.int64))
            scores = model(batch["X"])  # a sparse CSR tensor [128, n_var]
            loss = F.cross_entropy(scores, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            right += (scores.argmax(1) == labels).sum().item()
        print(f"epoch {epoch}: last loss {loss.item():.3f}, accuracy {right / loader.n_obs:.1%}")
    print(f"the last epoch read {loader.stats()['bytes_read'] / 1e6:.1f} MB")
    loader.close()
