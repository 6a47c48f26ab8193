"""The dictionary a pass yields.

``{"X", "obs", "var", "index"}`` as scverse annbatch has it, with ``"layers"`` and ``"obsm"`` where asked for. Only obs
is special: indexing 200 columns takes pandas longer than the core takes to decode the batch, so it is done when
``"obs"`` is read and not at all otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils import _pytree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping


class Batch(dict):
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

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
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
