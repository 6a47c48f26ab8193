"""Where data lie: what users write for it, and what they are told where it cannot be read."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse as sp

import annbatch
from annbatch import DatasetCollection, Loader
from annbatch._data.places import local_path, natural, places
from support.cells import densify

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

IN_ORDER = {"shuffle": False, "batch_size": 4, "chunk_size": 4, "preload_nchunks": 2}


def make(seed: int, genes: int = 5) -> ad.AnnData:
    counts = np.random.default_rng(seed).poisson(1.0, (6, genes)).astype("f4")
    names = [f"gene{k}" for k in range(genes)]
    obs = pd.DataFrame({"plate": [seed] * 6}, index=[f"{seed}-{k}" for k in range(6)])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=names))


def write(adata: ad.AnnData, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    adata.write_h5ad(path) if path.suffix == ".h5ad" else adata.write_zarr(path)
    return path


def plates(loader: Loader) -> list[int]:
    """The plates that a loader gives, each with all of its rows as they are."""
    batches = list(loader)
    found = np.concatenate([batch["obs"]["plate"] for batch in batches])
    np.testing.assert_array_equal(
        np.concatenate([densify(batch["X"]) for batch in batches]),
        np.concatenate([densify(make(int(seed)).X) for seed in found[::6]]),
    )
    return found[::6].tolist()


def opened(place: str | Path) -> Loader:
    return annbatch.open(place, **IN_ORDER)


def added(place: str | Path) -> Loader:
    return Loader(**IN_ORDER).add_adata(place)


def collected(place: str | Path) -> Loader:
    with tempfile.TemporaryDirectory() as folder:
        collection = DatasetCollection(f"{folder}/all.zarr").add_adatas([place], shuffle=False)
        adatas = [ad.io.read_elem(group) for group in collection]
    for adata in adatas:
        del adata.obs["src_path"]
    return Loader(**IN_ORDER).add_adatas(adatas)


WAYS = [opened, added, collected]


@pytest.mark.parametrize("way", WAYS)
def test_a_pattern_and_a_folder_are_their_files_in_natural_order(
    tmp_path: Path, way: Callable[[str | Path], Loader]
) -> None:
    # brackets in the name of the folder are no pattern
    folder = tmp_path / "run [x] #1"
    for number in (10, 9, 100, 2):
        write(make(number), folder / f"plate{number}.h5ad")
    (folder / "readme.txt").write_text("no data")
    (folder / "._plate2.h5ad").write_bytes(b"what macOS leaves behind")
    assert plates(way(str(folder / "*.h5ad"))) == [2, 9, 10, 100]
    assert plates(way(folder)) == [2, 9, 10, 100]
    assert plates(way(folder / "plate[29]*.h5ad")) == [2, 9]
    assert plates(way(f"{tmp_path}/**/plate?0.h5ad")) == [10]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("suffix", [".h5ad", ".zarr"])
def test_home_file_urls_and_names_that_look_like_patterns(
    tmp_path: Path, way: Callable[[str | Path], Loader], suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(make(1), tmp_path / f"home/a{suffix}")
    assert plates(way(f"~/a{suffix}")) == [1]
    odd = write(make(2), tmp_path / f"50% [a]*{suffix}")
    write(make(3), tmp_path / f"50% a{suffix}")
    assert plates(way(odd)) == [2]
    assert plates(way(f"file://{tmp_path}/home/a{suffix}")) == [1]
    assert plates(way(f"file://localhost{tmp_path}/home/a{suffix}")) == [1]
    assert plates(way(f"file://{tmp_path}/50%25%20a{suffix}")) == [3]
    # many write a path behind file:// as it is
    assert plates(way(f"file://{odd}")) == [2]


def test_a_directory_named_tilde_is_that_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(make(1), Path("~/a.h5ad"))
    assert local_path("~/a.h5ad") == Path("~/a.h5ad")
    assert local_path("~nobody-has-this-name/a.h5ad") == Path("~nobody-has-this-name/a.h5ad")
    assert plates(opened("~/a.h5ad")) == [1]


def test_collections_are_made_and_opened_in_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(make(1), tmp_path / "a.h5ad")
    DatasetCollection("~/all.zarr").add_adatas(["~/a.h5ad"], shuffle=False)
    assert plates(Loader(**IN_ORDER).use_collection(DatasetCollection("~/all.zarr", mode="r"))) == [1]
    assert plates(opened("~/all.zarr")) == [1]


@pytest.mark.parametrize("way", [opened, added])
@pytest.mark.parametrize(
    "url", ["s3://bucket/cells.zarr", "https://example.org/a.h5ad", "gs://b/c", "zip::s3://b/c.zip"]
)
def test_remote_stores_are_refused_with_what_to_do(way: Callable[[str | Path], Loader], url: str) -> None:
    for place in (url, Path(url)):
        with pytest.raises(ValueError, match=r"remote store.*local.*[Cc]opy or download"):
            way(place)


def test_archives_are_refused_with_what_to_do(tmp_path: Path) -> None:
    store = zarr.storage.ZipStore(tmp_path / "a.zarr.zip", mode="w")
    make(1).write_zarr(store)
    store.close()
    with pytest.raises(OSError, match=r"a\.zarr\.zip is a zip archive\. Unpack it"):
        opened(tmp_path / "a.zarr.zip")
    with zipfile.ZipFile(tmp_path / "a.zarr.zip") as archive:
        archive.extractall(tmp_path / "unpacked.zarr")
    assert plates(opened(tmp_path / "unpacked.zarr")) == [1]
    # a conversion reads it once, as zarr does
    assert plates(collected(tmp_path / "a.zarr.zip")) == [1]


def test_places_that_say_too_little(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Nothing matches the pattern .*\*\.h5ad"):
        opened(tmp_path / "*.h5ad")
    with pytest.raises(FileNotFoundError, match=r"There is no .*a\.h5ad"):
        opened(tmp_path / "a.h5ad")
    write(make(1), tmp_path / "both/a.h5ad")
    write(make(1), tmp_path / "both/a.zarr")
    with pytest.raises(
        ValueError, match=r"both holds h5ad files \(a\.h5ad, \.\.\.\) and Zarr stores \(a\.zarr, \.\.\.\)"
    ):
        opened(tmp_path / "both")
    assert plates(opened(tmp_path / "both/*")) == [1, 1]
    shutil.rmtree(tmp_path / "both/a.zarr")
    assert plates(opened(tmp_path / "both")) == [1]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no h5ad files.*with a pattern, such as .*none/\*\.zarr"):
        opened(tmp_path / "none")


def test_natural_order_compares_numbers_as_numbers() -> None:
    names = ["a2/1", "a10/1", "a2/02", "a2/2", "a2/x", "a2/10", "b"]
    shuffled = [Path(name) for name in reversed(names)]
    assert [str(path) for path in natural(shuffled)] == ["a2/1", "a2/02", "a2/2", "a2/10", "a2/x", "a10/1", "b"]


# ---------------------------------------------------------------------------------------------- MuData


def write_mudata(path: Path, plate: int) -> Path:
    """Write a MuData of two modalities: in HDF5 with the text that its writer puts in front of the file."""

    def fill(root: h5py.File | zarr.Group) -> None:
        for name, adata in (("rna", make(plate)), ("prot", make(plate, 3))):
            ad.io.write_elem(root.require_group("mod"), name, adata)
        ad.io.write_elem(root, "obs", make(plate).obs)
        ad.io.write_elem(root, "var", make(plate).var)
        root.attrs["encoding-type"], root.attrs["encoding-version"] = "MuData", "0.1.0"

    if path.suffix == ".zarr":
        fill(zarr.open_group(path, mode="w"))
        return path
    with h5py.File(path, "w", userblock_size=512) as file:
        fill(file)
    with path.open("r+b") as file:
        file.write(b"MuData (format-version=0.1.0;creator=a test)")
    return path


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("suffix", [".h5mu", ".zarr"])
def test_a_modality_is_opened_by_its_path_and_a_mudata_says_so(
    tmp_path: Path, way: Callable[[str | Path], Loader], suffix: str
) -> None:
    path = write_mudata(tmp_path / f"cite{suffix}", 4)
    assert plates(way(path / "mod/rna")) == [4]
    assert way(f"{path}/mod/prot").n_var == 3
    with pytest.raises((KeyError, ValueError), match=r"is a MuData of the modalities \['prot', 'rna'\].*/mod/prot"):
        way(path)
    if suffix == ".h5mu":
        with pytest.raises(KeyError, match=r"MuData of the modalities"):
            way(path / "mod/atac")


def test_modalities_of_many_files_are_one_pattern(tmp_path: Path) -> None:
    for plate in (2, 10):
        write_mudata(tmp_path / f"{plate}.h5mu", plate)
    assert plates(opened(tmp_path / "*.h5mu/mod/rna")) == [2, 10]
    assert [str(place) for place in places(tmp_path / "1?.h5mu/mod/rna")] == [f"{tmp_path}/10.h5mu/mod/rna"]
    loader = opened(tmp_path / "2.h5mu/mod/rna")
    assert loader.locate([3])[0]["path"] == str(tmp_path / "2.h5mu")


def test_the_data_module_takes_the_same_places(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    from annbatch.lightning import AnnbatchDataModule

    for plate in (10, 2):
        write(make(plate), tmp_path / f"h5/{plate}.h5ad")
        write(make(plate), tmp_path / f"zarr/{plate}.zarr")
    write_mudata(tmp_path / "cite.h5mu", 7)
    write_mudata(tmp_path / "cite.zarr", 7)
    for place, expected in [
        (tmp_path / "h5", [2, 10]),
        (f"{tmp_path}/h5/*.h5ad", [2, 10]),
        (f"{tmp_path}/zarr/*.zarr", [2, 10]),
        (f"file://{tmp_path}/zarr/2.zarr", [2]),
        (tmp_path / "cite.h5mu/mod/rna", [7]),
        (tmp_path / "cite.zarr/mod/rna", [7]),
    ]:
        module = AnnbatchDataModule(place, to=None, batch_size=6, chunk_size=6)
        module.prepare_data()
        assert plates(module.predict_dataloader()) == expected
        module.teardown()
    for name in ("cite.h5mu", "cite.zarr"):
        with pytest.raises((KeyError, ValueError), match="is a MuData"):
            AnnbatchDataModule(tmp_path / name).setup("fit")
    with pytest.raises(FileNotFoundError, match="There is no store at"):
        AnnbatchDataModule(tmp_path / "*.h5").prepare_data()
