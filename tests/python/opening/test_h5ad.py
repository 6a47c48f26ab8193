"""h5ad files: many, beside Zarr stores, of old versions, held open by anndata, changed meanwhile; errors name them."""

from __future__ import annotations

import os
import pickle
import warnings
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest

import annbatch
from annbatch import Loader
from support.cells import densify, write
from support.genes import CASES, GENES, check, concat, in_order, make, shuffled
from support.processes import run_python

if TYPE_CHECKING:
    from pathlib import Path


def test_many_files_are_opened_one_at_a_time(tmp_path: Path) -> None:
    make(3, GENES[:4], 0).write_h5ad(tmp_path / "0.h5ad")
    paths = [tmp_path / f"{k}.h5ad" for k in range(300)]
    for path in paths[1:]:
        path.symlink_to(paths[0])
    # in a process of its own: the core takes its share of the limit once, for all that the process has open
    done = run_python(
        """
        import resource, sys
        from pathlib import Path
        import annbatch
        held = len(list(Path("/dev/fd").iterdir()))
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + 100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        loader = annbatch.open([Path(sys.argv[1]) / f"{k}.h5ad" for k in range(300)], batch_size=64)
        print(sum(len(batch["obs"]) for batch in loader))
        """,
        tmp_path,
    )
    assert done.stdout == "900\n", done.stderr


def write_any(adata: ad.AnnData, folder: Path, k: int) -> Path:
    """Write h5ad and Zarr in turn."""
    if k % 2:
        return write(adata, folder / f"{k}.zarr")
    adata.write_h5ad(folder / f"{k}.h5ad", compression=[None, "gzip", "lzf"][k % 3])
    return folder / f"{k}.h5ad"


@pytest.mark.parametrize("join", ["outer", "inner"])
@pytest.mark.parametrize("dense", [False, True])
def test_h5ad_and_zarr_are_one(tmp_path: Path, dense: bool, join: str) -> None:
    spaces = [*CASES["unsorted"], GENES[2:], shuffled(GENES, 7)]
    adatas = [
        make(11 + 7 * k, genes, k, dense=dense, dtype=["float32", "int32"][k % 2]) for k, genes in enumerate(spaces)
    ]
    paths = [write_any(adata, tmp_path, k) for k, adata in enumerate(adatas)]
    expected = concat(adatas, join)
    loader = annbatch.open(paths, join=join, return_index=True, batch_size=8)
    check(loader, expected)
    assert [place["path"] for place in loader.locate([0, 11])] == [str(paths[0]), str(paths[1] / "X")]
    check(pickle.loads(pickle.dumps(loader)), expected)
    check(annbatch.open(paths, join=join, layer="doubled", return_index=True, batch_size=8), expected, "doubled")
    some = annbatch.open(paths, join=join, obs_columns=["depth"], return_index=True, batch_size=8)
    for batch in in_order(some):
        pd.testing.assert_frame_equal(batch["obs"], expected.obs[["depth"]].iloc[batch["index"]])


def test_raw_of_h5ad_has_variables_of_its_own(tmp_path: Path) -> None:
    adata = make(30, GENES, 0)
    adata.raw = adata
    smaller = adata[:, GENES[:7]].copy()
    smaller.write_h5ad(tmp_path / "raw.h5ad")
    loader = annbatch.open(tmp_path / "raw.h5ad", layer="raw", return_index=True, batch_size=8)
    assert loader.n_var == 30
    for batch in in_order(loader):
        np.testing.assert_array_equal(densify(batch["X"]), densify(adata.X)[batch["index"]])
    assert annbatch.open(tmp_path / "raw.h5ad").n_var == 7


def test_collections_of_h5ad_files(tmp_path: Path) -> None:
    adatas = [make(10, GENES, k) for k in range(12)]
    for k, adata in enumerate(adatas):
        adata.write_h5ad(tmp_path / f"dataset_{k}.h5ad")
    check(annbatch.open(tmp_path, return_index=True, batch_size=8), concat(adatas, "outer"))


def old_h5ad(path: Path, adata: ad.AnnData) -> None:
    """Write what anndata wrote before version 0.7: frames as records, matrices as h5sparse groups."""
    obs = np.array(
        [(str(name).encode(), depth) for name, depth in zip(adata.obs_names, adata.obs["depth"], strict=True)],
        dtype=[("index", "S16"), ("depth", "f4")],
    )
    var = np.array([(name.encode(),) for name in adata.var_names], dtype=[("index", "S16")])
    with h5py.File(path, "w") as file:
        file["obs"], file["var"] = obs, var
        x = file.create_group("X")
        x.attrs["h5sparse_format"], x.attrs["h5sparse_shape"] = b"csr", adata.shape
        for name in ("data", "indices", "indptr"):
            x[name] = getattr(adata.X, name)


@pytest.mark.filterwarnings("ignore")
def test_files_from_before_anndata_0_7(tmp_path: Path) -> None:
    adata = make(23, GENES, 0)
    old_h5ad(tmp_path / "old.h5ad", adata)
    new = make(9, GENES[::-1], 1)
    new.write_h5ad(tmp_path / "new.h5ad")
    read = ad.read_h5ad(tmp_path / "old.h5ad")
    np.testing.assert_array_equal(densify(read.X), densify(adata.X))
    check(
        annbatch.open([tmp_path / "old.h5ad", tmp_path / "new.h5ad"], return_index=True, batch_size=8),
        concat([read, new], "outer"),
    )
    for batch in annbatch.open(tmp_path / "old.h5ad", obs_columns=["depth"], return_index=True, batch_size=8):
        np.testing.assert_array_equal(batch["obs"]["depth"], adata.obs["depth"].iloc[batch["index"]])
    with pytest.raises(KeyError, match=r"old\.h5ad has no column 'doublet'; it has \['depth'\]"):
        annbatch.open([tmp_path / "new.h5ad", tmp_path / "old.h5ad"], obs_columns=["doublet"], join="inner")


@pytest.mark.parametrize("dense", [False, True])
def test_an_adata_that_is_backed_is_taken_by_its_file(tmp_path: Path, dense: bool) -> None:
    adata = make(40, GENES, 1, dense=dense)
    adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    settings = {"batch_size": 10, "chunk_size": 10, "preload_nchunks": 2, "return_index": True, "layers": ["doubled"]}
    with pytest.warns(FutureWarning, match="obsm/pca"):
        loader = Loader(**settings).add_adata(backed)
    # beside what is in memory and what is in Zarr
    loader.add_adata(write(adata, tmp_path / "a.zarr"))
    expected = np.concatenate([densify(adata.X)] * 2)
    seen = []
    for batch in loader:
        np.testing.assert_array_equal(densify(batch["X"]), expected[batch["index"]])
        np.testing.assert_array_equal(densify(batch["layers"]["doubled"]), 2 * expected[batch["index"]])
        seen.extend(batch["index"])
    assert sorted(seen) == list(range(80))
    # the file that the AnnData holds open is still its own
    np.testing.assert_array_equal(densify(backed.X[:5]), expected[:5])
    with pytest.raises(ValueError, match=r"view of .*a\.h5ad.*to_memory"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Loader(**settings).add_adata(backed[:7])
    backed.file.close()


def test_a_file_that_changes_under_a_loader_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.h5ad"
    first, second = make(100, GENES, 1), make(100, GENES[::-1], 2)
    for change in ("replaced", "written again"):
        first.write_h5ad(path)
        loader = annbatch.open(path, return_index=True, batch_size=8)
        copied = pickle.loads(pickle.dumps(loader))
        if change == "written again":
            in_order(loader)
            second.write_h5ad(path)
        else:
            second.write_h5ad(tmp_path / "b.h5ad")
            (tmp_path / "b.h5ad").replace(path)
        for changed in (loader, copied):
            with pytest.raises(OSError, match=r"a\.h5ad.*replaced or changed after it was opened"):
                in_order(changed)


def test_a_backed_adata_whose_file_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for k, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        make(10, GENES, k, dense=True).write_h5ad(tmp_path / name / "x.h5ad")
    monkeypatch.chdir(tmp_path / "a")
    backed = ad.read_h5ad("x.h5ad", backed="r")
    monkeypatch.chdir(tmp_path / "b")
    for _ in range(2):
        with (
            pytest.raises(OSError, match=r"x\.h5ad is not the file that this AnnData was opened from"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            Loader().add_adata(backed)
        # nor is one that is not there
        (tmp_path / "b/x.h5ad").unlink(missing_ok=True)
    backed.file.close()


def test_errors_about_h5ad_files_name_them(tmp_path: Path) -> None:
    adata = make(10, GENES, 0)
    adata.obs.index.name = "barcode"
    adata.write_h5ad(tmp_path / "a.h5ad")
    for batch in annbatch.open(tmp_path / "a.h5ad", obs_columns=["depth"]):
        assert batch["obs"].index.name == "barcode"
    with pytest.raises(KeyError, match=r"a\.h5ad has no layers/absent; layers has \['doubled'\]"):
        annbatch.open(tmp_path / "a.h5ad", layer="absent")
    for number, (member, change, error, message) in enumerate(
        [
            ("X/data", lambda file: file.__delitem__("X/data"), TypeError, "X is a CSR matrix without data"),
            ("shape", lambda file: file["X"].attrs.__delitem__("shape"), TypeError, "X has the attribute shape None"),
            (
                "shape",
                lambda file: file["X"].attrs.__setitem__("shape", [8, 30]),
                ValueError,
                "obs has 10 rows but the dataset has 8",
            ),
        ]
    ):
        path = tmp_path / f"{member.replace('/', '')}{number}.h5ad"
        adata.write_h5ad(path)
        with h5py.File(path, "r+") as file:
            change(file)
        with pytest.raises(error, match=rf"{path.name}: .*{message}"):
            annbatch.open(path)
    folder = tmp_path / "twice"
    folder.mkdir()
    for name in ("dataset_1", "dataset_01"):
        adata.write_h5ad(folder / f"{name}.h5ad")
    with pytest.raises(ValueError, match="a number twice"):
        annbatch.open(folder)
    with pytest.raises(TypeError, match="as text, not as bytes"):
        annbatch.open(bytes(tmp_path / "a.h5ad"))
    odd = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.h5ad")
    (tmp_path / "a.h5ad").rename(odd)
    with pytest.raises(ValueError, match="no text in UTF-8"):
        annbatch.open(odd)
