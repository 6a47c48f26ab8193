"""Arrays of the codecs ``zfp`` and ``zfpy``: read, or refused with the remedy by a library that was built without.

zarr-python reads neither without the package zfpy, so the chunks are given; tests/epoch.rs has the random stores.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from annbatch._core import ops as _ops
from support.oracle import load, opened

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.core

VALUES = np.arange(30, dtype="f4").reshape(6, 5) / 2
STREAM = bytes.fromhex("0d1a24326bd0e02aa2068db59a0ca6068db5980824000000")
"""What libzfp's reversible mode makes of `VALUES`."""
HEADER = bytes.fromhex("7a6670054600005000000088")
"""zfp's header of it: magic, float, 5 × 6, reversible."""

V3 = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [6, 5],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [6, 5]}},
    "chunk_key_encoding": {"name": "default"},
    "fill_value": 0.0,
    "attributes": {"encoding-type": "array", "encoding-version": "0.2.0"},
}
V2 = {
    "zarr_format": 2,
    "shape": [6, 5],
    "chunks": [6, 5],
    "dtype": "<f4",
    "order": "C",
    "fill_value": 0.0,
    "filters": None,
    "compressor": {"id": "zfpy", "mode": 5, "rate": -1, "precision": -1, "tolerance": -1},
}
ZFP = {"name": "zfp", "configuration": {"mode": "reversible"}}
ZFPY = {"name": "numcodecs.zfpy", "configuration": {"mode": 5}}


def _write(root: Path, metadata: dict[str, Any], chunk: bytes) -> dict[str, Any]:
    """A dataset whose X is one chunk, and the configuration that reads it."""
    array = root / "X"
    (array / "c" / "0").mkdir(parents=True)
    if metadata["zarr_format"] == 3:
        (root / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
        (array / "zarr.json").write_text(json.dumps(metadata))
        (array / "c" / "0" / "0").write_bytes(chunk)
    else:
        (root / ".zgroup").write_text(json.dumps({"zarr_format": 2}))
        (array / ".zarray").write_text(json.dumps(metadata))
        (array / ".zattrs").write_text(json.dumps(V3["attributes"]))
        (array / "0.0").write_bytes(chunk)
    sampling = {"kind": "sequential", "chunk_size": 6, "preload_nchunks": 1, "batch_size": 6}
    return {"elements": [{"name": "X"}], "datasets": [{"path": str(root)}], "sampling": sampling}


def _read(config: dict[str, Any]) -> np.ndarray:
    """X; skips where the library has no zfp, once its error has the remedy."""
    try:
        with opened(config) as state:
            _ops.start(state, 0)
            return load(state)[-1].numpy().copy()
    except TypeError as error:
        if "built without zfp" not in str(error):
            raise
        assert "pip install libclang" in str(error)
        assert "X" in str(error)
        pytest.skip("built without zfp")


@pytest.mark.parametrize(
    ("metadata", "chunk"),
    [
        ({**V3, "codecs": [ZFP]}, STREAM),
        ({**V3, "codecs": [ZFPY]}, None),
        (V2, None),
    ],
    ids=["zfp", "zfpy v3", "zfpy v2"],
)
def test_read(tmp_path: Path, metadata: dict[str, Any], chunk: bytes | None) -> None:
    np.testing.assert_array_equal(_read(_write(tmp_path, metadata, chunk or HEADER + STREAM)), VALUES)


@pytest.mark.parametrize("byte", range(len(HEADER) - 1))  # the last is the mode alone
def test_a_header_that_describes_another_array_is_an_error(tmp_path: Path, byte: int) -> None:
    header = bytearray(HEADER)
    header[byte] ^= 0x21
    with pytest.raises(_ops.DataError, match=r"X.*damaged"):
        _read(_write(tmp_path, V2, bytes(header) + STREAM))


def test_zfp_inside_of_nested_shards_is_refused(tmp_path: Path) -> None:
    def sharded(chunk: list[int], codecs: list[Any]) -> dict[str, Any]:
        index = [{"name": "bytes", "configuration": {"endian": "little"}}]
        configuration = {"chunk_shape": chunk, "codecs": codecs, "index_codecs": index}
        return {"name": "sharding_indexed", "configuration": configuration}

    config = _write(tmp_path, {**V3, "codecs": [sharded([6, 5], [sharded([3, 5], [ZFP])])]}, b"")
    with pytest.raises(TypeError, match=r"X.*zfp"):
        _read(config)
