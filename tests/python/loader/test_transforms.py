"""What transforms do to batches, against scanpy and anndata on the whole matrix."""

from __future__ import annotations

import itertools
import pickle
from typing import TYPE_CHECKING, Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
from scipy import sparse as sp

import annbatch
from annbatch import Loader
from annbatch._core import ops as _ops
from annbatch.transforms import Log1p, NormalizeTotal, SelectVar
from support.cells import densify, make_adata, write

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.core

N_OBS, N_VAR = 700, 40
SIZES = {"batch_size": 300, "chunk_size": 50, "preload_nchunks": 12, "shuffle": True, "return_index": True}
STORED = ["uint8", "uint16", "int32", "int64", "float32", "float64", "bool"]

PIPELINES = {
    "nothing": [],
    "normalize": [NormalizeTotal(1e4)],
    "log1p": [Log1p()],
    "log2": [Log1p(base=2)],
    "both": [NormalizeTotal(1e4), Log1p()],
    "backwards": [Log1p(), NormalizeTotal(100)],
    "subset": [SelectVar([3, 4, 17])],
    "permutation": [SelectVar(np.random.default_rng(0).permutation(N_VAR))],
    "subset of a subset": [SelectVar(np.arange(30)[::-1]), NormalizeTotal(50), SelectVar([29, 0, 5]), Log1p()],
    "normalize, then select": [NormalizeTotal(1e4), Log1p(), SelectVar([39, 0, 20])],
    "select, then normalize": [SelectVar([39, 0, 20]), NormalizeTotal(1e4), Log1p()],
}


def matrix(dtype: str, *, dense: bool) -> Any:
    rng = np.random.default_rng(3)
    counts = rng.integers(1, 2 if dtype == "bool" else 250, (N_OBS, N_VAR)) * (rng.random((N_OBS, N_VAR)) < 0.3)
    counts[rng.random(N_OBS) < 0.1] = 0
    counts = counts.astype(dtype)
    if dtype.startswith("float"):
        counts *= rng.random((N_OBS, 1)).astype(dtype)
    return counts if dense else sp.csr_matrix(counts)


def by_scanpy(counts: Any, steps: list[Any]) -> np.ndarray:
    adata = ad.AnnData(counts.copy())
    for step in steps:
        if isinstance(step, NormalizeTotal):
            sc.pp.normalize_total(adata, target_sum=step.target_sum)
        elif isinstance(step, Log1p):
            adata.uns.pop("log1p", None)
            sc.pp.log1p(adata, base=step.base)
        else:
            adata = adata[:, np.asarray(step.var)].copy()
    return densify(adata.X)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], ad.AnnData]:
    import zarr

    from annbatch.utils import load_all_aligned

    root = tmp_path_factory.mktemp("transforms")
    out = {}
    for dtype, dense in itertools.product(STORED, [False, True]):
        path = write(ad.AnnData(matrix(dtype, dense=dense)), root / f"{dtype}-{dense}")
        out[dtype, dense] = load_all_aligned(zarr.open_group(path, mode="r"))
    return out


def batches_of(adata: ad.AnnData, **options: Any) -> list[dict[str, Any]]:
    return list(Loader(**{**SIZES, **options}).add_adata(adata))


def numbers(x: Any) -> np.ndarray:
    if isinstance(x, torch.Tensor):
        x = (x if x.layout == torch.strided else x.to_dense()).double().numpy()
    return densify(x)


TOLERANCE = {None: 3e-6, "float32": 3e-6, "float64": 3e-6, "float16": 1.5e-3, "bfloat16": 1.2e-2}


def computes(steps: list[Any]) -> bool:
    return any(not isinstance(step, SelectVar) for step in steps)


FORMS = [
    *[(dense, None, to) for dense in (False, True) for to in (None, "torch")],
    *[(False, "float16", None), (False, "bfloat16", "torch"), (True, "float16", "torch")],
    *[(True, "bfloat16", "torch"), (True, "float64", None), (False, "float32", "torch")],
]
# scanpy normalizes no bool
CASES = [(stored, name) for stored in STORED for name in PIPELINES if stored != "bool" or not computes(PIPELINES[name])]


@pytest.mark.parametrize(("stored", "name"), CASES)
@pytest.mark.parametrize("dense_store", [False, True], ids=["sparse", "dense"])
def test_batches_are_scanpys(stores: Any, stored: str, dense_store: bool, name: str) -> None:
    steps = PIPELINES[name]
    arithmetic = computes(steps)
    expected = by_scanpy(matrix(stored, dense=dense_store), steps).astype("float64")
    for dense, dtype, to in FORMS:
        seen = []
        for batch in batches_of(stores[stored, dense_store], transform=steps, dense=dense, dtype=dtype, to=to):
            x, rows = batch["X"], batch["index"]
            seen.extend(rows.tolist())
            np.testing.assert_allclose(numbers(x), expected[rows], rtol=TOLERANCE[dtype], atol=1e-30)
            wanted = dtype or ({"float64": "float64"}.get(stored, "float32") if arithmetic else stored)
            if to == "torch":
                wanted = "int32" if wanted == "uint16" else wanted
                assert x.dtype == getattr(torch, wanted)
                assert x.layout == (torch.strided if dense or dense_store else torch.sparse_csr)
                if x.layout == torch.sparse_csr:
                    parts = x.crow_indices(), x.col_indices(), x.values()
                    torch.sparse_csr_tensor(*parts, size=x.shape, check_invariants=True)
            else:
                sparse = not dense and not dense_store
                assert sp.issparse(x) == sparse
                # scipy has no sparse matrices of half precision
                assert x.dtype == ("float32" if sparse and wanted == "float16" else wanted)
            assert x.shape == (len(rows), expected.shape[1])
        assert sorted(seen) == list(range(N_OBS))


def test_float32_is_scanpys_to_the_last_bits(stores: Any) -> None:
    """Not merely near: two units in the last place, where scanpy rounds a few times more than once."""
    expected = by_scanpy(matrix("float32", dense=False), PIPELINES["both"])
    for batch in batches_of(stores["float32", False], transform=PIPELINES["both"], dense=True):
        np.testing.assert_array_max_ulp(batch["X"], expected[batch["index"]], maxulp=4)


def test_rows_without_entries_unusual_values_and_duplicates() -> None:
    data = np.array([np.nan, 1, np.inf, 2, -3, 3, -0.5, -1, -2, 4, 5, 6], dtype="float32")
    indices = np.array([0, 1, 0, 2, 1, 0, 2, 1, 0, 2, 2, 2], dtype="int32")
    indptr = np.array([0, 2, 4, 4, 6, 9, 12], dtype="int32")
    x = sp.csr_matrix((data, indices, indptr), shape=(6, 3))
    sizes = {"batch_size": 6, "chunk_size": 6, "preload_nchunks": 1}

    def row_by_row(steps: list[Any]) -> np.ndarray:
        out = np.zeros((6, 3))
        for row in range(6):
            columns, places = np.unique(indices[indptr[row] : indptr[row + 1]], return_inverse=True)
            values = np.zeros(len(columns))
            np.add.at(values, places, data[indptr[row] : indptr[row + 1]])
            for step in steps:
                with np.errstate(all="ignore"):
                    if isinstance(step, Log1p):
                        values = np.log1p(values)
                    elif values.sum() != 0:
                        values = values / (values.sum() / step.target_sum)
            out[row, columns] = values
        return out

    for steps, dense in itertools.product(([Log1p()], [NormalizeTotal(10)], []), (True, False)):
        (batch,) = Loader(**sizes, transform=steps, dense=dense).add_dataset(x)
        np.testing.assert_allclose(densify(batch["X"]), row_by_row(steps), rtol=1e-6)
    (batch,) = Loader(**sizes, transform=[SelectVar([2, 0])], dense=False).add_dataset(x)
    np.testing.assert_allclose(densify(batch["X"]), row_by_row([])[:, [2, 0]], rtol=1e-6)


@pytest.mark.parametrize("suffix", ["zarr", "h5ad"])
@pytest.mark.parametrize("stored", ["uint8", "int32", "int64", "float32", "float64"])
@pytest.mark.parametrize("order", ["sorted", "unsorted"])
def test_entries_of_one_column_are_added_up_before_what_is_not_linear(
    tmp_path: Path, stored: str, order: str, suffix: str
) -> None:
    """Valid for scipy, and nothing in the format forbids it: log(1 + sum), not the sum of logarithms."""
    rng = np.random.default_rng(5)
    lengths = rng.integers(0, 60, N_OBS)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = rng.integers(0, N_VAR, indptr[-1])
    if order == "sorted":
        indices = np.concatenate([np.sort(indices[a:b]) for a, b in itertools.pairwise(indptr)])
    x = sp.csr_matrix((rng.integers(0, 9, indptr[-1]).astype(stored), indices, indptr), shape=(N_OBS, N_VAR))
    adata = ad.AnnData(x)
    getattr(adata, {"zarr": "write_zarr", "h5ad": "write_h5ad"}[suffix])(tmp_path / f"x.{suffix}")
    read = getattr(ad, {"zarr": "read_zarr", "h5ad": "read_h5ad"}[suffix])(tmp_path / f"x.{suffix}").X
    assert not read.has_canonical_format
    counts = read.toarray()
    for name, steps in PIPELINES.items():
        expected = by_scanpy(counts.astype(stored if stored == "float64" else "float32"), steps)
        for dense, to in itertools.product([False, True], [None, "torch"]):
            options = {"transform": steps, "dense": dense, "to": to, "shuffle": False, "batch_size": 64}
            got = np.concatenate([numbers(b["X"]) for b in annbatch.open(tmp_path / f"x.{suffix}", **options)])
            np.testing.assert_allclose(got, expected, rtol=3e-6, err_msg=f"{name}, {options}")


def test_only_x_is_transformed_and_var_follows(tmp_path: Path) -> None:
    adata = make_adata(90, 1)
    adata.var["length"] = np.arange(adata.n_vars)
    genes = ["gene7", "gene2", "gene9"]
    options = {"layers": ["doubled"], "obsm": ["spots"], "transform": [SelectVar(genes), Log1p()], "batch_size": 20}
    loader = Loader(**{**SIZES, "preload_nchunks": 2, **options}).add_adata(
        ad.AnnData(adata.X, obs=adata.obs, var=adata.var, layers=adata.layers, obsm={"spots": adata.obsm["spots"]})
    )
    assert loader.n_var == 3
    pd.testing.assert_frame_equal(loader.var, adata.var.loc[genes])
    for batch in loader:
        rows = batch["index"]
        assert batch["var"] is loader.var
        np.testing.assert_allclose(densify(batch["X"]), np.log1p(densify(adata[:, genes].X)[rows]), rtol=1e-6)
        np.testing.assert_array_equal(densify(batch["layers"]["doubled"]), densify(adata.layers["doubled"])[rows])
        np.testing.assert_array_equal(densify(batch["obsm"]["spots"]), densify(adata.obsm["spots"])[rows])
        pd.testing.assert_frame_equal(batch["obs"], adata.obs.iloc[rows])
    copy = pickle.loads(pickle.dumps(loader))
    assert copy.n_var == 3
    assert next(iter(copy))["X"].shape == (20, 3)


@pytest.mark.parametrize("var", [np.arange(11) % 3 == 0, [-1, 0], pd.Index(["gene4"]), np.array([3], dtype="uint8")])
def test_ways_to_select(var: Any) -> None:
    adata = make_adata(30, 2)
    expected = densify(adata[:, var].X)
    for batch in Loader(
        chunk_size=10, preload_nchunks=3, batch_size=10, return_index=True, transform=[SelectVar(var)]
    ).add_adata(ad.AnnData(adata.X, var=adata.var)):
        np.testing.assert_array_equal(densify(batch["X"]), expected[batch["index"]])


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"transform": ["log1p"]}, TypeError, "NormalizeTotal"),
        ({"transform": [np.log1p]}, TypeError, "SelectVar"),
        ({"dtype": "int32"}, ValueError, "dtype.*int32"),
        ({"dtype": torch.int8}, ValueError, "dtype.*int8"),
        ({"dtype": "bfloat16"}, ValueError, "torch"),
        ({"transform": [SelectVar(["gene1", "no such"])]}, KeyError, "1 of 2.*no such"),
        ({"transform": [SelectVar([0, 11])]}, IndexError, "column 11.*11 variables"),
        ({"transform": [SelectVar([0, -12])]}, IndexError, "column -12"),
        ({"transform": [SelectVar([2, 2])]}, ValueError, "more than once"),
        ({"transform": [SelectVar([])]}, ValueError, "at least one"),
        ({"transform": [SelectVar("gene1")]}, TypeError, "string"),
        ({"transform": [SelectVar(np.zeros(11, bool))]}, ValueError, "selects no"),
        ({"transform": [SelectVar(np.ones(10, bool))]}, ValueError, "mask of 10"),
        ({"transform": [SelectVar([1, 2]), SelectVar([2])]}, IndexError, "column 2"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], error: type[Exception], said: str) -> None:
    adata = make_adata(20, 5)
    with pytest.raises(error, match=said):
        list(
            Loader(chunk_size=4, preload_nchunks=5, batch_size=5, **options).add_adata(
                ad.AnnData(adata.X, var=adata.var)
            )
        )


@pytest.mark.parametrize("number", [0, -1, float("nan"), float("inf")])
def test_numbers_out_of_range_are_refused(number: float) -> None:
    with pytest.raises(ValueError, match="target_sum"):
        NormalizeTotal(number)
    with pytest.raises(ValueError, match="base"):
        Log1p(base=number)


@pytest.mark.parametrize(
    ("transform", "said"),
    [
        ({"steps": [{"normalize_total": {"target_sum": 0}}]}, "target_sum is 0"),
        ({"steps": [{"normalize_total": {}}]}, "target_sum"),
        ({"steps": [{"log1p": {"base": 1}}]}, "base is 1"),
        ({"steps": [{"log1p": {"base": -2}}]}, "base is -2"),
        ({"steps": [{"columns": []}]}, "no column"),
        ({"steps": [{"columns": [0, 0]}]}, "column 0 is selected twice"),
        ({"steps": [{"columns": [2**40]}]}, "column 1099511627776 does not exist"),
        ({"steps": [{"columns": [-1]}]}, "columns"),
        ({"steps": [{"square": {}}]}, "square"),
        ({"dtype": "int32"}, "int32.*float32"),
        ({"densely": True}, "densely"),
    ],
)
def test_the_core_names_what_it_refuses(transform: dict[str, Any], said: str) -> None:
    x = torch.ones(4, 3)
    config = {
        "datasets": [{"sources": {"X": {"dense": {"data": 0}}}}],
        "elements": [{"name": "X", "transform": transform}],
    }
    with pytest.raises(ValueError, match=said):
        _ops.open_state(config, [x])


def test_elements_that_are_no_matrices_are_refused() -> None:
    config = {
        "datasets": [{"sources": {"X": {"dense": {"data": 0}}}}],
        "elements": [{"name": "X", "transform": {"steps": [{"log1p": {}}]}}],
    }
    for shape in ((4, 3, 2), (4,)):
        with pytest.raises((TypeError, ValueError), match="X"):
            _ops.open_state(config, [torch.ones(shape)])


def test_compiled_code_knows_the_form_and_the_end() -> None:
    x = sp.random(20, 6, 0.5, format="csr", dtype="float32", random_state=1)
    buffers = [torch.from_numpy(a) for a in (x.indptr, x.indices, x.data)]
    csr = {"indptr": 0, "indices": 1, "data": 2, "shape": [20, 6]}
    config = {
        "datasets": [{"sources": {"X": {"csr": csr}}}],
        "elements": [{"name": "X", "transform": {"steps": [{"columns": [5, 0]}], "dense": True, "dtype": "bfloat16"}}],
        "sampling": {"kind": "sequential", "chunk_size": 5, "preload_nchunks": 2, "batch_size": 10},
    }
    state = _ops.open_state(config, buffers)
    (element,) = _ops.describe(state)["elements"]
    assert (element["kind"], element["dtype"], element["tail"]) == ("dense", "bfloat16", [2])
    assert element["nnz"] == x.nnz

    @torch.compile(fullgraph=True)
    def step(state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, values = torch.ops.annbatch.load(state)
        return rows, values.float() * 2

    _ops.start(state, 0)
    for first in (0, 10):
        rows, values = step(state)
        assert rows.tolist() == list(range(first, first + 10))
        expected = torch.from_numpy(x.toarray()[first : first + 10, [5, 0]]).bfloat16().float() * 2
        assert torch.equal(values, expected)
    rows, values = torch.ops.annbatch.load(state)
    assert (rows.numel(), values.shape, values.dtype) == (0, (0, 2), torch.bfloat16)
    _ops.close(state)


@pytest.mark.parametrize(
    ("stored", "dense_store", "options"),
    [
        ("float32", False, {"dense": True}),
        ("uint8", True, {"transform": [Log1p()]}),
        ("uint8", True, {"dtype": "float32"}),
    ],
)
def test_the_budget_counts_what_is_made(stores: Any, stored: str, dense_store: bool, options: dict[str, Any]) -> None:
    adata = stores[stored, dense_store]

    def needed(**options: Any) -> int:
        with pytest.raises(MemoryError, match="memory_budget") as refused:
            batches_of(adata, memory_budget=1, shuffle=False, **options)
        return int(str(refused.value).split("needs ")[1].split(" bytes")[0])

    bytes_needed = needed(**options)
    assert bytes_needed >= needed() + 300 * N_VAR * 4
    batches = batches_of(adata, memory_budget=2 * bytes_needed, shuffle=False, **options)
    assert sum(len(batch["index"]) for batch in batches) == N_OBS


def test_what_changes_nothing_is_not_done(stores: Any) -> None:
    loader = Loader(**SIZES, dtype="float32").add_adata(stores["float32", False])
    assert sum(len(batch["index"]) for batch in loader) == N_OBS
    assert loader.stats()["seal_ns"] == 0
    images = Loader(batch_size=4, chunk_size=4, preload_nchunks=1, dtype="float32")
    images.add_dataset(np.ones((8, 3, 2), dtype="float32"))
    assert [batch["X"].shape for batch in images] == [(4, 3, 2)] * 2


def test_a_loader_without_data_has_no_variables() -> None:
    loader = Loader(transform=[SelectVar(["gene1"])])
    assert loader.var is None
    with pytest.raises(ValueError, match="No datasets"):
        _ = loader.n_var


def test_a_damaged_chunk_fails_its_batch_and_seals_the_others(tmp_path: Path) -> None:
    import zarr

    from annbatch.utils import load_all_aligned

    path = write(ad.AnnData(matrix("float32", dense=True)), tmp_path / "store")
    chunks = sorted((path / "X/c").iterdir(), key=lambda p: int(p.name))
    loader = Loader(**{**SIZES, "shuffle": False}, transform=[Log1p()], to="torch").add_adata(
        load_all_aligned(zarr.open_group(path, mode="r"))
    )
    (chunks[-1] / "0").write_bytes(b"damaged")
    batches = iter(loader)
    first = next(batches)
    np.testing.assert_allclose(first["X"].numpy(), np.log1p(matrix("float32", dense=True)[:300]), rtol=1e-6)
    next(batches)
    with pytest.raises((_ops.DataError, OSError), match="X"):
        next(batches)
