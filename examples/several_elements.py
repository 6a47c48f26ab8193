"""Several elements per batch: counts, a layer and an embedding of the same cells, read by one plan."""

import tempfile

import torch

from _cells import small_collection
from annbatch import Loader

with tempfile.TemporaryDirectory() as folder:
    loader = Loader(
        layers=["log"], obsm=["size"], chunk_size=64, preload_nchunks=16, batch_size=256, to="torch", return_index=True
    ).use_collection(small_collection(folder, extras=True))
    for batch in loader:
        counts, log, size = batch["X"], batch["layers"]["log"], batch["obsm"]["size"]
        assert torch.allclose(counts.to_dense().log1p(), log.to_dense())
        assert torch.equal(counts.to_dense().sum(1, keepdim=True), size)
    print(f"X {tuple(counts.shape)} {counts.layout}, log {tuple(log.shape)} {log.layout}, size {tuple(size.shape)}")

    (place,) = loader.locate([2500])
    print(f"cell 2500 is {place['obs_name']}: row {place['local_row']} of dataset {place['dataset']}")
    loader.close()
