"""What the pages of `docs/` and the README show is run, and prints what they say it prints.

Each page is one test. Its ``python`` blocks run in order, in one namespace, in a directory of its own that holds

    lung.h5ad, heart.zarr, cite.h5mu, plates/plate{1,2,10}.h5ad      400, 300, 100 and three times 120 cells
    cells.zarr                                                       a collection made from lung.h5ad and heart.zarr

A ``text`` block right behind a ``python`` block is what that block prints. ``<!-- not run: why -->`` in the line before a block
has it compiled only: it needs a GPU, several processes, or files that are not there.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import warnings
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse as sp

import annbatch
from annbatch import DatasetCollection

ROOT = next((folder for folder in Path(__file__).parents if (folder / "docs" / "conf.py").exists()), None)
if ROOT is None:
    pytest.skip("the pages are not here: the bundle for GPU machines leaves them out", allow_module_level=True)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(
    r"(?P<not_run><!-- not run: [^>]+ -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
LINK = re.compile(r"(?<!`)\[[^\]]+\]\((?P<target>[^)#\s]+)(#[^)\s]*)?\)")


class Block(NamedTuple):
    line: int
    code: str
    prints: str | None
    runs: bool


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(text):
        if fence["language"] == "python":
            line = text.count("\n", 0, fence.start("code"))
            found.append(Block(line, fence["code"], None, fence["not_run"] is None))
        elif fence["language"] == "text" and found and not text[end : fence.start()].strip():
            found[-1] = found[-1]._replace(prints=fence["code"])
        end = fence.end()
    return found


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in PAGES if blocks(page)]


def cells(n_obs: int, genes: list[str], seed: int, tissue: str) -> ad.AnnData:
    rng = np.random.default_rng(seed)
    types = np.array(["B", "NK", "T"])[rng.integers(0, 3, n_obs)]
    counts = rng.poisson(0.4, (n_obs, len(genes))).astype("float32")
    counts[types == "B", :5] += 3  # so that something can be learnt
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(types, categories=["B", "NK", "T"]),
            "donor": pd.Categorical([f"donor{k}" for k in rng.integers(0, 6, n_obs)]),
            "tissue": pd.Categorical([tissue] * n_obs),
        },
        index=[f"{tissue}{k}" for k in range(n_obs)],
    )
    adata = ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=genes))
    adata.layers["counts"] = adata.X.copy()
    adata.obsm["X_pca"] = counts[:, :4].copy()
    return adata


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    genes = [f"gene{k:02}" for k in range(40)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells(400, genes, 0, "lung").write_h5ad(folder / "lung.h5ad")
        cells(300, [*genes[10:], "other1", "other2"], 1, "heart").write_zarr(folder / "heart.zarr")
        (folder / "plates").mkdir()
        for k in (1, 2, 10):
            cells(120, genes, k, f"plate{k}").write_h5ad(folder / "plates" / f"plate{k}.h5ad", compression="gzip")
        with h5py.File(folder / "cite.h5mu", "w") as file:
            file.attrs["encoding-type"] = "MuData"
            ad.io.write_elem(file.create_group("mod"), "rna", cells(100, genes, 3, "blood"))
        DatasetCollection(folder / "cells.zarr").add_adatas(
            [folder / "lung.h5ad", folder / "heart.zarr"], shuffle_chunk_size=10, rng=np.random.default_rng(0)
        )
    return folder


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_code_of_a_page_runs_and_prints_what_it_says(
    page: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        # errors name the line of the page
        code = compile("\n" * block.line + block.code, str(page), "exec")
        if not block.runs:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.prints is not None:
            assert printed.getvalue() == block.prints, f"{name_of(page)}:{block.line}"


def test_every_python_block_is_found():
    for page in PAGES:
        marked = [line for line in page.read_text().splitlines() if line.strip().startswith("```python")]
        assert len(marked) == len(blocks(page)), f"{name_of(page)} has an indented or unclosed block"


def test_links_between_pages_lead_somewhere():
    broken = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in LINK.finditer(text):
            target = link["target"]
            if not re.match(r"[a-z]+:", target) and not (page.parent / target).exists():
                broken.append(f"{name_of(page)}: {target}")
    assert not broken


def test_every_public_name_has_an_entry_in_the_reference():
    reference = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    modules = (annbatch, annbatch.abc, annbatch.io, annbatch.nn, annbatch.samplers, annbatch.transforms, annbatch.types)
    names = {name for module in modules for name in module.__all__} | {"open", "open_state", "load", "DataError"}
    assert {name for name in names if not re.search(rf"\b{name}\b", reference)} == set()


def test_every_figure_of_stats_is_on_the_page_about_speed(data: Path):
    loader = annbatch.open(data / "lung.h5ad")
    next(iter(loader))
    page = (ROOT / "docs" / "guide" / "slow.md").read_text()
    assert {name for name in loader.stats() if f"`{name}`" not in page} == set()
