"""In which form batches come back: from the core's tensors to the dictionary that the user sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from annbatch._output.batch import Batch
from annbatch._output.options import device_now
from annbatch.convert import OutputLibrary, convert_csr, convert_dense, stored_as

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    import torch

    from annbatch._core.passes import RawBatch
    from annbatch._data.datasets import Datasets
    from annbatch._output.obs import ObsTable
    from annbatch.transforms import Transform


@dataclass(frozen=True)
class Form:
    """What a loader was asked to yield, and where.

    Parameters
    ----------
    to, obs, return_index
        As for `annbatch.Loader`.
    device
        The CUDA device that was asked for, or ``None``.
    preload_to_gpu
        Whether upstream's argument asks for the current CUDA device.
    wanted
        Names of further elements by ``"layers"`` and ``"obsm"``.
    transform
        What is done to ``X``.
    """

    to: OutputLibrary
    obs: str
    return_index: bool
    device: torch.device | None
    preload_to_gpu: bool
    wanted: Mapping[str, Sequence[str]]
    transform: Transform

    @property
    def stored_as(self) -> str:
        """How the core delivers values, see `annbatch.convert.stored_as`."""
        return stored_as(self.to)

    def device_now(self) -> torch.device | None:
        """Return the device of a pass that begins now, see `annbatch._output.options.device_now`."""
        return device_now(self.device, self.preload_to_gpu)

    def dress(
        self, raw: RawBatch, datasets: Datasets, variables: tuple[pd.DataFrame | None, int], obs: ObsTable | None
    ) -> dict[str, Any]:
        """Make the dictionary that the user sees.

        Parameters
        ----------
        raw
            The batch as the core delivers it.
        datasets
            What it is of.
        variables
            var as batches have it, and the number of columns of ``X``.
        obs
            The annotations of all rows.
        """
        rows = raw.rows.numpy()
        var, n_var = variables
        batch = {
            "X": self._converted(raw, "X", n_var) if datasets.has_x else None,
            "obs": None,
            "var": var,
            "index": rows if self.return_index else None,
        }
        for group, names in self.wanted.items():
            if names:
                keys = {name: f"{group}/{name}" for name in names}
                batch[group] = {name: self._converted(raw, key, datasets.width(key)) for name, key in keys.items()}
        if obs is None:
            return batch
        # a copy: the user may change the index before obs is looked up
        rows = rows.copy() if self.return_index else rows
        return Batch(batch, partial(obs.codes if self.obs == "codes" else obs.frame, rows))

    def _converted(self, raw: RawBatch, name: str, n_var: int) -> Any:
        parts = raw.parts[name]
        # upstream's rule about types on the GPU gives way to a type that was asked for
        preload_to_gpu = self.preload_to_gpu and not (name == "X" and self.to == "torch" and self.transform.dtype)
        if len(parts) == 1:
            return convert_dense(parts[0], to=self.to, preload_to_gpu=preload_to_gpu)
        indptr, indices, data = parts
        return convert_csr(indptr, indices, data, n_var, to=self.to, preload_to_gpu=preload_to_gpu)
