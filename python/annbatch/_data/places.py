"""Where data lie, from what users write: paths, ``~``, patterns, ``file://`` URLs, and paths that lead into an HDF5 file."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

# Path makes one slash of two
_URL = re.compile(r"([a-z][a-z0-9+.:-]+):/+(.*)", re.IGNORECASE | re.DOTALL)


class Place(NamedTuple):
    """A file or directory that is there, and the group that is meant in it (``""``: its root)."""

    path: Path
    within: str

    def __str__(self) -> str:
        return str(self.path / self.within)


def local_path(path: str | os.PathLike[str]) -> Path:
    """Return `path` with ``~`` and ``file://`` replaced by what they stand for. What is there by that very name is that.

    Raises
    ------
    ValueError
        If it is a URL of elsewhere.
    """
    text = os.fspath(path)
    if os.path.lexists(text):
        return Path(text)
    if url := _URL.fullmatch(text):
        scheme, rest = url.groups()
        if scheme.lower() != "file":
            raise ValueError(
                f"{text} is a remote store: annbatch reads local files and directories. Copy or download it first, and open "
                "the copy."
            )
        rest = "/" + rest.removeprefix("localhost/")
        # many write a path behind file:// as it is
        return Path(rest) if os.path.lexists(rest) else Path(unquote(rest))
    return Path(os.path.expanduser(text))  # noqa: PTH111 - a user whom nobody knows is left as written


def is_remote(path: Any) -> bool:
    """Whether `path` is a URL of elsewhere."""
    url = _URL.fullmatch(path) if isinstance(path, str) and not os.path.lexists(path) else None
    return url is not None and url[1].lower() != "file"


def is_zarr(path: Path) -> bool:
    """Whether a directory is a Zarr group."""
    return any((path / name).exists() for name in ("zarr.json", ".zgroup"))


def places(path: str | os.PathLike[str]) -> list[Place]:
    """Find what `path` names, several in natural order.

    Of a pattern (``*``, ``?``, ``[...]``, ``**``) that is all that match, of a folder that is no Zarr group its h5ad files.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is a URL of elsewhere, or a folder of which it cannot be told what is meant.
    """
    path = local_path(path)
    # the longest part of it that is there; what follows may be in a file
    for part in (path, *path.parents):
        if part == path:
            found, within = [file for match in natural(_matching(part)) for file in _files_of(match)], ""
        else:
            found, within = (
                natural([file for file in _matching(part) if file.is_file()]),
                path.relative_to(part).as_posix(),
            )
        if found:
            return [Place(file, within) for file in found]
    if glob.has_magic(str(path)):
        raise FileNotFoundError(f"Nothing matches the pattern {path}")
    raise FileNotFoundError(f"There is no {path}")


def _files_of(path: Path) -> list[Path]:
    """Return the h5ad files of a folder, or what lies at `path` if it is none of such files."""
    files = natural([file for file in path.glob("*.h5ad") if not file.name.startswith(".")]) if path.is_dir() else []
    numbers = [int(file.stem[8:]) for file in files if file.stem.startswith("dataset_") and file.stem[8:].isdecimal()]
    if len(set(numbers)) < len(numbers) or (numbers and is_zarr(path)):
        raise ValueError(
            f"{path} is no collection: it holds {[file.name for file in files]}, with a number twice or in a "
            "Zarr group. Name the files one by one, as a list."
        )
    if not files or is_zarr(path):
        return [path]
    if stores := [store.parent.name for name in ("zarr.json", ".zgroup") for store in path.glob(f"*/{name}")]:
        # one may be a copy of the other
        raise ValueError(
            f"{path} holds h5ad files ({files[0].name}, ...) and Zarr stores ({stores[0]}, ...). Say which are meant, "
            f"with a pattern such as {path}/*.h5ad, or as a list."
        )
    return files


def _matching(path: Path) -> list[Path]:
    # brackets in names of folders that are there are no pattern
    there = next(part for part in (path, *path.parents, Path()) if part.exists())
    if there == path:
        return [path]
    pattern = os.path.join(glob.escape(str(there)), path.relative_to(there))  # noqa: PTH118 - a pattern is no path
    # not by pathlib, which matches hidden files
    return [Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).exists()]  # noqa: PTH207


def natural(paths: list[Path]) -> list[Path]:
    """Sort paths as people do: ``plate2`` comes before ``plate10``."""
    return sorted(paths, key=_natural_key)


def _natural_key(path: Path) -> tuple[Any, ...]:
    # text and numbers in turn
    parts = [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]
    return parts, str(path)
