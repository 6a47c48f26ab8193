"""Which layers, obsm entries and obs columns the inputs of a conversion have, and that these differ."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from annbatch._base.warn import stacklevel_outside_package
from annbatch._data.attributes import columns_of, names_in

from ._opening import has_x

if TYPE_CHECKING:
    from collections.abc import Sequence

    import anndata as ad
    import zarr


@dataclass
class Keys:
    """Which keyed elements one object holds."""

    label: Any
    layers: set[str]
    obsm: set[str]
    obs: set[str]
    has_raw: bool
    has_x: bool

    @classmethod
    def of(cls, adata: ad.AnnData, label: Any) -> Keys:
        """Keys of an opened object."""
        keyed = {name: set(getattr(adata, name).keys()) - {None} for name in ("layers", "obsm")}
        return cls(
            label,
            obs=set(adata.obs.columns) - {"_index"},
            has_raw=adata.raw is not None,
            has_x=adata.X is not None,
            **keyed,
        )

    @classmethod
    def of_stored(cls, group: zarr.Group) -> Keys:
        """Keys of a stored object, from metadata."""
        keyed = {name: set(names_in(group, name)) for name in ("layers", "obsm")}
        columns = set(columns_of(group["obs"]))
        return cls(group.name, obs=columns, has_raw="raw" in group and has_x(group["raw"]), has_x=has_x(group), **keyed)


def warn_of_differing_keys(keys: Sequence[Keys]) -> None:
    """Warn of elements that some objects have and others lack."""
    labels = [key.label for key in keys]
    if 0 < sum(key.has_raw for key in keys) < len(keys):
        warnings.warn(
            f"Found raw keys not present in all anndatas {labels}, consider deleting raw or moving it to a shared "
            "layer/X location via `load_adata`",
            stacklevel=stacklevel_outside_package(),
        )
    for name in ("layers", "obsm", "obs"):
        counts = Counter(key for each in keys for key in getattr(each, name))
        differing = sorted(key for key, count in counts.items() if count < len(keys))
        if differing:
            warnings.warn(
                f"Found {name} keys {differing} not present in all anndatas {labels}, consider stopping and using "
                f"the `load_adata` argument to alter {name} accordingly.",
                stacklevel=stacklevel_outside_package(),
            )
