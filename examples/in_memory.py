"""Data that are in memory already: the core reads scipy and NumPy matrices in place, with the same loader."""

import numpy as np

from _cells import labelled_cells
from annbatch import Loader

adata = labelled_cells(5000, seed=0)

sparse = Loader(shuffle=True, batch_size=500, chunk_size=1, preload_nchunks=5000, return_index=True)
sparse.add_adata(adata)  # adata.X is a scipy.sparse.csr_matrix
for batch in sparse:
    assert (batch["X"] != adata.X[batch["index"]]).nnz == 0
    assert batch["obs"].index.equals(adata.obs.index[batch["index"]])
print(f"sparse: {len(sparse)} batches like {batch['X']!r}")

dense = Loader(batch_size=500, chunk_size=500, preload_nchunks=1, to="torch")
dense.add_dataset(adata.X.toarray(), obs=adata.obs)
total = sum(batch["X"].sum().item() for batch in dense)
assert np.isclose(total, adata.X.sum())
print(f"dense: {len(dense)} batches, all values add up to {total:,.0f}")
