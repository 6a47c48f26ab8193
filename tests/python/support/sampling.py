"""What the property tests ask for: bounded hypothesis settings, sizes of a sampling, and whole random cases."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from support import drawing, stores
from support.stores import ArrayLayout, Collection, CsrSpec, DatasetSpec, DenseSpec

if TYPE_CHECKING:
    from pathlib import Path

_MORE = int(os.environ.get("ANNBATCH_EXAMPLES", "1"))


def bounded(examples: int) -> settings:
    """Settings for a property test of about `examples` examples."""
    return settings(
        max_examples=examples * _MORE,
        derandomize=_MORE == 1,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )


@dataclass(frozen=True)
class Plan:
    """Sizes of a native sampling: `batch_size` divides `chunk_size * preload_nchunks`."""

    chunk_size: int
    preload_nchunks: int
    batch_size: int

    @property
    def window(self) -> int:
        """Rows of a preload window."""
        return self.chunk_size * self.preload_nchunks

    def config(self, kind: str, **fields: Any) -> dict[str, Any]:
        """The sampling configuration."""
        sizes = {"chunk_size": self.chunk_size, "preload_nchunks": self.preload_nchunks, "batch_size": self.batch_size}
        return {"kind": kind, **sizes, **fields}


@st.composite
def plans(draw: Any, most_rows: int = 40) -> Plan:
    """A plan whose window is at most `most_rows` rows."""
    chunk_size = draw(st.integers(1, most_rows))
    preload = draw(st.integers(1, max(1, most_rows // chunk_size)))
    window = chunk_size * preload
    return Plan(chunk_size, preload, draw(st.sampled_from([n for n in range(1, window + 1) if window % n == 0])))


@dataclass
class Case:
    """One random store and how it is read."""

    specs: list[DatasetSpec]
    elements: dict[str, str]
    plan: Plan
    seed: int
    options: dict[str, Any]


@st.composite
def cases(draw: Any) -> Case:
    """Random stores, the elements in random order with dtype requests, sizes and options."""
    specs = drawing.draw_collection(drawing.HypothesisChooser(draw))
    names = draw(st.permutations(list(specs[0].elements)))
    options = {
        "threads": draw(st.sampled_from([None, 1, 3])),
        "io_depth": draw(st.sampled_from([None, 1, 2])),
        "batches_ahead": draw(st.sampled_from([None, 0, 1, 2])),
    }
    elements = {name: draw(st.sampled_from(["torch", "native"])) for name in names}
    return Case(specs, elements, draw(plans()), draw(st.integers(0, 2**31)), options)


def fixed_collection(path: Path) -> Collection:
    """Three stores, 71 + 1 + 38 rows: X sharded, unsharded and of format 2, layers/counts beside it, obsm dense."""
    specs = []
    for i, (n_obs, zarr_format) in enumerate([(71, 3), (1, 2), (38, 3)]):
        sharded = ArrayLayout(3, (13,), (39,), "blosc lz4 shuffle")
        flat = ArrayLayout(zarr_format, (17,), codec="zstd", separator=".")
        layout = sharded if i == 0 else flat
        csr = dict.fromkeys(("indptr", "indices", "data"), layout)
        specs.append(
            DatasetSpec(
                n_obs,
                zarr_format,
                consolidated=False,
                elements={
                    "X": CsrSpec((n_obs, 30), "any", False, "f4", "i4", "i8", i, csr),
                    "layers/counts": CsrSpec((n_obs, 30), "sparse", False, "u2", "u1", "i4", i + 9, csr),
                    "obsm/pca": DenseSpec((n_obs, 5), False, "f4", i, ArrayLayout(zarr_format, (7, 3))),
                },
            )
        )
    return stores.write_collection(path, specs)
