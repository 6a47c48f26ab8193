"""The dictionary a pass yields.

``{"X", "obs", "var", "index"}`` as scverse annbatch has it, with ``"layers"`` and ``"obsm"`` where asked for. Only obs
is special: indexing 200 columns takes pandas longer than the core takes to decode the batch, so it is done when
``"obs"`` is read and not at all otherwise.

A `DataLoader` that was not told ``batch_size=None`` would make batches of batches; it is refused here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, SupportsIndex

import torch
from torch.utils import _pytree
from torch.utils.data import default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from types import FrameType


class Batch(dict[str, Any]):
    """A batch whose ``"obs"`` is made when it is first read; otherwise the plain dict with the same items.

    Copies and pickles are plain dicts.

    Parameters
    ----------
    items
        The batch; what stands under ``"obs"`` holds its place among the keys.
    obs
        Makes the value of ``"obs"``; ``None`` if it stands among the items. (What moves batches between devices makes
        another one from the items, as ``type(batch)(items)``.)
    """

    def __init__(self, items: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), obs: Callable[[], Any] | None = None):
        super().__init__(items)
        self._make_obs = obs

    def _settle(self) -> None:
        make_obs = self._make_obs
        if make_obs is not None:
            # a second thread may make it again; none can see the placeholder
            super().__setitem__("obs", make_obs())
            self._make_obs = None

    def __getitem__(self, key: str) -> Any:
        if key == "obs":
            self._settle()
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        if key == "obs":
            self._settle()
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        # Overridden because CPython's dict(batch), {**batch} and update(batch) then go through keys() and
        # __getitem__; for a class that inherits it they copy the table, placeholder and all.
        return super().__iter__()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _settling(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    def method(self: Batch, *args: Any, **kwargs: Any) -> Any:
        self._settle()
        return plain(self, *args, **kwargs)

    method.__name__ = name
    method.__doc__ = plain.__doc__
    return method


for _name in (
    *("values", "items", "pop", "popitem", "setdefault", "copy", "update", "clear"),
    *("__setitem__", "__delitem__", "__eq__", "__ne__", "__or__", "__ror__", "__ior__", "__repr__"),
):
    setattr(Batch, _name, _settling(_name))

# so that torch's tree_map sees the tensors inside, as it does for a dict
_pytree.register_pytree_node(
    Batch,
    lambda batch: (list(batch.values()), list(batch)),
    lambda values, keys: dict(zip(keys, values, strict=True)),
)


def moved(value: Any, device: torch.device) -> Any:
    """Return a batch, or a part of one, with its tensors on `device`; everything else stays as it is."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Batch):
        # The obs of a batch are made when first read: moving must not make them.
        items = {key: None if key == "obs" else moved(part, device) for key, part in dict.items(value)}
        return Batch(items, lambda: moved(value["obs"], device))
    if isinstance(value, dict):
        return {key: moved(part, device) for key, part in value.items()}
    return value


def refuse_collation(batches: Any = None, *, collate_fn_map: Any = None) -> NoReturn:
    """Refuse to make one batch of several, as torch's ``default_collate`` does for a `DataLoader` with a batch size.

    Raises
    ------
    ValueError
        With the remedy.
    """
    raise ValueError(
        "A DataLoader over an annbatch.Loader needs batch_size=None: the loader yields whole batches, of the batch_size "
        "that it was made with, and these cannot be collated. Write DataLoader(loader, batch_size=None, ...), or pass "
        "a collate_fn of your own that merges batches."
    )


def refuse_collating(caller: FrameType | None) -> None:
    """Refuse a pass that a `DataLoader` begins in order to collate its batches.

    Torch collates when it has as many batches as its batch size says, which may be more than fit into memory, and
    tells a dataset nothing of that size. So this looks at who asks for the first batch.

    Parameters
    ----------
    caller
        The frame that advanced the loader's generator. Torch's is a method of a fetcher, in workers too.

    Raises
    ------
    ValueError
        If it is a fetcher that is to collate with torch's own function.
    """
    fetcher = None if caller is None else caller.f_locals.get("self")
    if getattr(fetcher, "auto_collation", False) and getattr(fetcher, "collate_fn", None) is default_collate:
        refuse_collation()


# for datasets of the user's own that pass our batches on
default_collate_fn_map[Batch] = refuse_collation
