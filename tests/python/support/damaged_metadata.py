"""Damages of metadata and of what arrays say about each other; see :mod:`damages`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from annbatch._core.ops import DataError
from support.damages import (
    HUGE,
    IN_DATA,
    MISSING,
    N_OBS,
    N_VAR,
    NNZ,
    Damage,
    assign,
    both,
    drop,
    metadata,
    metadata_text,
    other_n_var,
    remove,
    set_at,
    to_dense,
    values,
)

if TYPE_CHECKING:
    from collections.abc import Callable

REFUSED = (DataError, ValueError, TypeError)
"""For metadata that is both wrong and not supported, where either class says it well."""

_SHARDING = ("codecs", 0, "configuration")
_GRID = ("chunk_grid", "configuration", "chunk_shape")


def _huge() -> list[Damage]:
    too_much = (DataError, MemoryError, ValueError)

    def everywhere(document: dict[str, Any]) -> None:
        document["shape"] = [HUGE]
        document["chunk_grid"]["configuration"]["chunk_shape"] = [HUGE]
        document["codecs"][0]["configuration"]["chunk_shape"] = [HUGE]

    said = ("ds1", "X")
    return [
        Damage("data of 2^60 elements", metadata(set_at("shape", value=[HUGE])), IN_DATA, too_much),
        Damage("data in one chunk of 2^60", metadata(everywhere), IN_DATA, too_much),
        Damage("inner chunks of 2^60", metadata(set_at(*_SHARDING, "chunk_shape", value=[HUGE])), IN_DATA, too_much),
        Damage("shards of 2^60", metadata(set_at(*_GRID, value=[HUGE])), IN_DATA, too_much),
        Damage("shards of 2^64 - 64", metadata(set_at(*_GRID, value=[2**64 - 64])), IN_DATA, too_much),
        Damage("shape of 2^64", metadata(set_at("shape", value=[2**64])), IN_DATA, too_much),
        Damage("indptr of 2^60", metadata(set_at("shape", value=[HUGE]), "X/indptr"), said, too_much),
        Damage(
            "2^60 rows",
            lambda ds: (
                metadata(set_at("shape", value=[HUGE + 1]), "X/indptr")(ds),
                metadata(set_at("attributes", "shape", value=[HUGE, N_VAR]), "X")(ds),
            ),
            said,
            too_much,
        ),
        Damage("dense of 2^60 x 2^60", metadata(set_at("shape", value=[HUGE, HUGE]), "X"), said, too_much, "dense"),
        Damage("dense rows of 2^60", metadata(set_at("shape", value=[N_OBS, HUGE]), "X"), said, too_much, "dense"),
        Damage(
            "dense chunks of 2^60",
            metadata(both(set_at(*_GRID, value=[HUGE, 30]), set_at(*_SHARDING, "chunk_shape", value=[HUGE, 30])), "X"),
            said,
            too_much,
            "dense",
        ),
    ]


def _instead_of_metadata(node: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(dataset: Path) -> None:
        (dataset / node / "zarr.json").unlink()
        make(dataset / node / "zarr.json")

    return apply


def _not_metadata() -> list[Damage]:
    texts: dict[str, str | bytes] = {
        "cut": '{"zarr_format": 3, "node_type": "arr',
        "empty": "",
        "binary": bytes(range(256)),
        "a number": "3",
        "null": "null",
        "a list": "[]",
        "empty object": "{}",
        "nested 200,000 deep": "[" * 200_000,
    }
    damages = [Damage(f"metadata {name}", metadata_text(text), IN_DATA, REFUSED) for name, text in texts.items()]
    damages += [
        Damage(f"group metadata {name}", metadata_text(text, "X"), ("ds1", "X"), REFUSED)
        for name, text in texts.items()
    ]
    damages.append(
        Damage(
            "v2 metadata is no JSON", lambda ds: (ds / "X/data/.zarray").write_text("{"), IN_DATA, REFUSED, "v2 none"
        )
    )
    for node, said in (("X", ("ds1", "X")), ("X/data", IN_DATA)):
        folder = _instead_of_metadata(node, Path.mkdir)
        damages.append(Damage(f"metadata of {node} is a directory", folder, said, (*REFUSED, OSError)))
    return damages


def _wrong_fields() -> list[Damage]:
    changes: dict[str, Any] = {
        "chunks of zero": set_at(*_GRID, value=[0]),
        "negative chunks": set_at(*_GRID, value=[-256]),
        "chunks of another rank": set_at(*_GRID, value=[256, 1]),
        "no chunks": set_at(*_GRID, value=[]),
        "fractional chunks": set_at(*_GRID, value=[255.5]),
        "inner chunks of zero": set_at(*_SHARDING, "chunk_shape", value=[0]),
        "inner chunks that do not divide": set_at(*_SHARDING, "chunk_shape", value=[48]),
        "negative shape": set_at("shape", value=[-NNZ]),
        "shape missing": drop("shape"),
        "rank 0": both(set_at("shape", value=[]), set_at(*_GRID, value=[])),
        "codecs missing": drop("codecs"),
        "no codecs": set_at("codecs", value=[]),
        "unknown codec": set_at("codecs", value=[{"name": "made_up"}]),
        "unknown grid": set_at("chunk_grid", "name", value="made_up"),
        "unknown key encoding": set_at("chunk_key_encoding", "name", value="made_up"),
        "format 4": set_at("zarr_format", value=4),
        "unknown index location": set_at(*_SHARDING, "index_location", value="middle"),
        "compressed index": set_at(
            *_SHARDING,
            "index_codecs",
            value=[{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "gzip"}],
        ),
        "fill value of another type": set_at("fill_value", value="red"),
    }
    damages = [Damage(name, metadata(change), IN_DATA, REFUSED) for name, change in changes.items()]
    v2 = {
        "v2 chunks of zero": set_at("chunks", value=[0]),
        "v2 negative chunks": set_at("chunks", value=[-16]),
        "v2 chunks of 2^60": both(set_at("shape", value=[HUGE]), set_at("chunks", value=[HUGE])),
        "v2 unknown order": set_at("order", value="Q"),
        "v2 unknown dtype": set_at("dtype", value="<q9"),
        "v2 format 9": set_at("zarr_format", value=9),
    }
    anything = (*REFUSED, MemoryError)
    damages += [Damage(name, metadata(change), IN_DATA, anything, "v2 zlib") for name, change in v2.items()]
    unsupported = {
        "made_up": ("sharded", set_at("codecs", value=[{"name": "made_up", "configuration": {}}])),
        "numcodecs.delta": (
            "sharded",
            set_at(
                *_SHARDING,
                "codecs",
                value=[
                    {"name": "numcodecs.delta", "configuration": {"dtype": "<f4"}},
                    {"name": "bytes", "configuration": {"endian": "little"}},
                ],
            ),
        ),
        "lzma": ("v2 none", set_at("compressor", value={"id": "lzma"})),
        "delta": ("v2 none", set_at("filters", value=[{"id": "delta", "dtype": "<f4"}])),
    }
    damages += [
        Damage(f"unsupported codec {name}", metadata(change), (*IN_DATA, name), (TypeError,), victim)
        for name, (victim, change) in unsupported.items()
    ]
    return damages


def _contradictions() -> list[Damage]:
    shape = ("attributes", "shape")
    indptr, indices = ("ds1", "X/indptr"), ("ds1", "X/indices")
    somewhere = ("ds1", "X", f"{NNZ}|{NNZ - 1}|{NNZ + 1}")
    return [
        Damage(
            "data longer than indptr says",
            values("X/data", lambda v: np.append(v, [1, 2]).astype("f4")),
            ("ds1", "X", "data", str(NNZ + 2)),
        ),
        Damage("data shorter than indptr says", values("X/data", lambda v: v[:-1]), ("ds1", "X", "data", str(NNZ - 1))),
        Damage(
            "indices longer than indptr says",
            values("X/indices", lambda v: np.append(v, 0)),
            ("ds1", "X", "indices", str(NNZ + 1)),
        ),
        Damage(
            "indices shorter than indptr says",
            values("X/indices", lambda v: v[:-1]),
            ("ds1", "X", "indices", str(NNZ - 1)),
        ),
        Damage("indptr ends too late", values("X/indptr", assign(-1, NNZ + 1)), somewhere),
        Damage("indptr ends too early", values("X/indptr", assign(-1, NNZ - 1)), somewhere),
        Damage(
            "indptr decreases", values("X/indptr", assign(5, 300)), (*indptr, "decreas|less|monoton|order", r"\b[56]\b")
        ),
        Damage("indptr falls below zero", values("X/indptr", assign(3, -7)), (*indptr, "-7")),
        Damage("indptr does not begin at zero", values("X/indptr", assign(0, 4)), (*indptr, "4")),
        Damage("indptr far beyond", values("X/indptr", assign(6, 2**62)), indptr, REFUSED),
        Damage("indptr too short", values("X/indptr", lambda v: v[:-1]), ("ds1", "X", r"\b24\b|\b25\b")),
        Damage("indptr too long", values("X/indptr", lambda v: np.append(v, NNZ)), ("ds1", "X", r"\b25\b|\b26\b")),
        Damage("indptr empty", values("X/indptr", lambda v: v[:0]), ("ds1", "X")),
        Damage("a column beyond n_var", values("X/indices", assign(70, N_VAR)), (*indices, "30", "chunk")),
        Damage("a column far beyond n_var", values("X/indices", assign(70, 2**31 - 1)), (*indices, "2147483647")),
        Damage("a negative column", values("X/indices", assign(70, -1)), (*indices, "-1|negative", "chunk")),
        Damage(
            "a column that wraps around 2^32",
            values("X/indices", lambda v: np.where(np.arange(NNZ) == 70, 2**32 + 1, v.astype("i8"))),
            (*indices, "4294967297"),
        ),
        Damage(
            "an unsigned column beyond int64",
            values("X/indices", lambda v: np.where(np.arange(NNZ) == 70, np.uint64(2**64 - 1), v.astype("u8"))),
            indices,
        ),
        Damage("fewer columns in shape", metadata(set_at(*shape, value=[N_OBS, 29]), "X"), ("ds1",), REFUSED),
        Damage(
            "more rows in shape",
            metadata(set_at(*shape, value=[N_OBS + 1, N_VAR]), "X"),
            ("ds1", str(N_OBS + 1)),
            REFUSED,
        ),
        Damage("shape of three", metadata(set_at(*shape, value=[N_OBS, N_VAR, 1]), "X"), ("ds1", "shape"), REFUSED),
        Damage("shape negative", metadata(set_at(*shape, value=[-N_OBS, N_VAR]), "X"), ("ds1", "shape"), REFUSED),
        Damage("shape of words", metadata(set_at(*shape, value=["a", "b"]), "X"), ("ds1", "shape"), REFUSED),
        Damage("shape attribute missing", metadata(drop(*shape), "X"), ("ds1", "shape"), REFUSED),
    ]


def _kinds() -> list[Damage]:
    encoding = ("attributes", "encoding-type")
    wrong_kind = (TypeError,)

    def rank(n: int) -> Any:
        return lambda v: np.ones((4,) * n, "f4") if n else np.array(1, "f4")

    def complex_data(v: np.ndarray) -> np.ndarray:
        return v.astype("c8")

    def words(v: np.ndarray) -> np.ndarray:
        return np.array(["a", "bb"] * (NNZ // 2))

    def fixed_words(v: np.ndarray) -> np.ndarray:
        return np.array([b"a", b"bb"] * (NNZ // 2))

    csc = both(set_at(*encoding, value="csc_matrix"))
    return [
        Damage("X missing", remove("X"), ("ds1", "X"), MISSING),
        *(Damage(f"{a} missing", remove(f"X/{a}"), ("ds1", f"X/{a}"), MISSING) for a in ("data", "indices", "indptr")),
        Damage("the store missing", remove(""), ("ds1", "dataset_1.zarr"), MISSING),
        Damage(
            "a directory that is no store",
            lambda ds: (remove("")(ds), ds.mkdir(), (ds / "readme.txt").write_text("hello")),
            ("ds1", "dataset_1.zarr"),
            MISSING,
        ),
        Damage("a file for a store", lambda ds: (remove("")(ds), ds.write_text("x")), ("ds1",), (OSError, *REFUSED)),
        Damage("encoding-type missing", metadata(drop(*encoding), "X"), ("ds1", "X", "encoding-type"), REFUSED),
        Damage("csc_matrix", metadata(csc, "X"), ("ds1", "X", "csc", r"csr|tocsr|convert"), wrong_kind),
        Damage("a data frame", metadata(set_at(*encoding, value="dataframe"), "X"), ("X", "dataframe"), wrong_kind),
        Damage("another n_var", other_n_var, ("ds1", "30", "32", "var"), (ValueError, TypeError)),
        Damage("dense beside sparse", to_dense, ("ds1", "X", "dense", "csr|sparse"), (ValueError, TypeError)),
        Damage("X of rank 1", values("X", rank(1)), ("ds1", "X", "rank|dimension"), REFUSED, "dense"),
        Damage("X of rank 0", values("X", rank(0)), ("ds1", "X", "rank|dimension"), REFUSED, "dense"),
        Damage("X of another rank", values("X", rank(3)), ("ds1", "X"), REFUSED, "dense"),
        Damage("complex data", values("X/data", complex_data), (*IN_DATA, "complex"), wrong_kind),
        Damage("complex X", values("X", complex_data), ("ds1", "X", "complex"), wrong_kind, "dense"),
        Damage("data of words", values("X/data", words), (*IN_DATA, "str|utf|dtype|data type"), wrong_kind),
        Damage("data of bytes", values("X/data", fixed_words), (*IN_DATA, "byte|dtype|data type"), wrong_kind),
        Damage(
            "indices of floats", values("X/indices", lambda v: v.astype("f4")), ("ds1", "X/indices", "float32"), REFUSED
        ),
        Damage(
            "indptr of floats", values("X/indptr", lambda v: v.astype("f8")), ("ds1", "X/indptr", "float64"), REFUSED
        ),
        Damage("data of rank 2", values("X/data", lambda v: v.reshape(-1, 10)), ("ds1", "X", r"data.*72, 10"), REFUSED),
        Damage("indices of rank 2", values("X/indices", lambda v: v.reshape(-1, 10)), ("ds1", "X", "indices"), REFUSED),
        Damage("indptr of rank 2", values("X/indptr", lambda v: v.reshape(-1, 1)), ("ds1", "X", "indptr"), REFUSED),
        Damage(
            "data is a group",
            lambda ds: (
                remove("X/data")(ds),
                (ds / "X/data").mkdir(),
                metadata_text('{"zarr_format":3,"node_type":"group"}')(ds),
            ),
            IN_DATA,
            (*REFUSED, FileNotFoundError),
        ),
    ]


DAMAGED_METADATA = [*_huge(), *_not_metadata(), *_wrong_fields(), *_contradictions(), *_kinds()]

PIPED_METADATA = [
    Damage(f"metadata of {node} is a pipe", _instead_of_metadata(node, os.mkfifo), ("ds1", "X"), (*REFUSED, OSError))
    for node in ("X", "X/data")
]
