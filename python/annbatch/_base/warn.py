"""Warnings: the line that they point at, how often they come, and one wording for what several modules warn of."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_PACKAGE = Path(__file__).resolve().parents[1]


def stacklevel_outside_package() -> int:
    """Return the ``stacklevel`` with which a warning of the caller points at the first line outside this package.

    ``skip_file_prefixes`` of :func:`warnings.warn` does this from Python 3.12 on; 3.11 is supported too.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _PACKAGE in Path(frame.f_code.co_filename).resolve().parents:
        level, frame = level + 1, frame.f_back
    return level


def warn_once(message: str, category: type[Warning], *, stacklevel: int | None = None) -> None:
    """Warn once for each distinct message, at the caller's first line outside of this package.

    A filter does that: the action ``"once"`` is forgotten in notebooks, and a set of our own would outlive
    `warnings.catch_warnings`.

    Parameters
    ----------
    message, category
        As for :func:`warnings.warn`.
    stacklevel
        Points at another line; as for :func:`warnings.warn`, counted from the caller of this function.
    """
    level = stacklevel_outside_package() if stacklevel is None else stacklevel + 1
    warnings.warn(message, category, stacklevel=level)
    warnings.filterwarnings("ignore", message=re.escape(message), category=category)


def ignored_elements(names: Iterable[str]) -> str:
    """Return the warning of elements (``"layers/…"``, ``"obsm/…"``) that an AnnData has and a loader leaves out."""
    return (
        "Only `X`, `obs`, and `var` are kept for now; the following observation-aligned elements are ignored: "
        f"{sorted(names)}. Name those to yield in `Loader(layers=[...], obsm=[...])`, and leave the others out of the "
        "AnnData objects (e.g. with a `load_adata` of your own) to silence this warning: a future release will "
        "yield all that every object has."
    )
