"""Write the golden stores: one small AnnData, as the anndata of this environment writes it.

``python tests/data/make_golden.py`` adds ``golden-<anndata>-<layout>.zip`` beside this file for the formats v2, v3
and v3 with shards, and ``golden.npz``, the contents, which are the same whoever writes them. Run it once in an
environment of each anndata release to be covered; the files are committed, so that a change of this project's reader
is measured against what others wrote.
"""

from __future__ import annotations

import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

HERE = Path(__file__).parent
N_OBS, N_VAR, N_RAW = 37, 23, 29


def contents() -> dict[str, np.ndarray | sp.csr_matrix]:
    """Every element, from one seed; row 5 has no entries in any of the sparse ones."""
    rng = np.random.default_rng(20)
    lengths = rng.integers(1, 12, size=N_OBS)
    lengths[5] = 0

    def sparse(n_var: int, dtype: str) -> sp.csr_matrix:
        columns = [np.sort(rng.choice(n_var, size=k, replace=False)) for k in lengths]
        indices = np.concatenate(columns).astype(np.int32)
        data = rng.integers(1, 200, size=len(indices)).astype(dtype)
        return sp.csr_matrix((data, indices, np.concatenate([[0], np.cumsum(lengths)])), shape=(N_OBS, n_var))

    return {
        "X": sparse(N_VAR, "float32"),
        "layers/counts": sparse(N_VAR, "uint16"),
        "layers/dense": rng.standard_normal((N_OBS, N_VAR)),
        "obsm/pca": rng.standard_normal((N_OBS, 5)).astype(np.float32),
        "obsm/image": rng.integers(0, 256, size=(N_OBS, 4, 3, 2), dtype=np.uint8),
        "raw/X": sparse(N_RAW, "int64"),
    }


def annotated(elements: dict[str, np.ndarray | sp.csr_matrix]) -> ad.AnnData:
    """The AnnData object that holds `elements`."""
    obs = pd.DataFrame(
        {"label": pd.Categorical([f"type {i % 3}" for i in range(N_OBS)]), "depth": np.arange(N_OBS, dtype=float)},
        index=[f"cell{i}" for i in range(N_OBS)],
    )
    raw = ad.AnnData(elements["raw/X"], obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(N_RAW)]))
    adata = ad.AnnData(elements["X"], obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(N_VAR)]))
    adata.raw = raw
    for name, values in elements.items():
        group, _, key = name.partition("/")
        if group in ("layers", "obsm"):
            getattr(adata, group)[key] = values
    return adata


def write(adata: ad.AnnData, layout: str, path: Path) -> None:
    """Write `adata` in one of the layouts."""
    ad.settings.zarr_write_format = 2 if layout == "v2" else 3
    if layout != "v3-sharded":
        adata.write_zarr(path)
        return
    import zarr

    def write_one(write_elem, group, key, elem, dataset_kwargs, iospec) -> None:
        if iospec.encoding_type in ("array", "csr_matrix"):
            rows = elem.shape[0]
            sparse = iospec.encoding_type == "csr_matrix"
            chunks = (20,) if sparse else (max(1, rows // 5), *elem.shape[1:])
            shards = tuple(4 * c if i == 0 else c for i, c in enumerate(chunks))
            if rows == N_OBS:
                dataset_kwargs = {**dataset_kwargs, "chunks": chunks, "shards": shards}
        write_elem(group, key, elem, dataset_kwargs=dataset_kwargs)

    ad.experimental.write_dispatched(zarr.open_group(path, mode="w", zarr_format=3), "/", adata, callback=write_one)


def main() -> None:
    """Write all layouts and the contents."""
    elements = contents()
    flat = {}
    for name, values in elements.items():
        if isinstance(values, np.ndarray):
            flat[name] = values
        else:
            flat |= {f"{name}:{part}": getattr(values, part) for part in ("indptr", "indices", "data")}
            flat[f"{name}:shape"] = np.array(values.shape)
    np.savez_compressed(HERE / "golden.npz", **flat)
    release = ".".join(version("anndata").split(".")[:2])
    for layout in ("v2", "v3", "v3-sharded"):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "golden.zarr"
            write(annotated(elements), layout, path)
            target = HERE / f"golden-{release}-{layout}.zip"
            with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                for file in sorted(path.rglob("*")):
                    if file.is_file():
                        # a fixed time, so that a rewrite of equal contents is an equal file
                        member = zipfile.ZipInfo(file.relative_to(folder).as_posix(), (2025, 1, 1, 0, 0, 0))
                        member.compress_type = zipfile.ZIP_DEFLATED
                        archive.writestr(member, file.read_bytes())
            print(target.name, target.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
