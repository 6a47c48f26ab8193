"""The op library: found and loaded here, and its reads ended when the interpreter ends.

In: ``_annbatch.so`` of the package. Out: `OPS`, which is ``torch.ops.annbatch`` (schemas in ``cpp/ops.cpp``).
"""

from __future__ import annotations

import atexit
import threading
import time
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[1] / "_annbatch.so"
OLDEST_TORCH = "2.11"


def _load_library(library: Path) -> None:
    """Load the op library into torch, or say in one sentence what keeps it from loading."""
    if not library.exists():
        msg = (
            f"annbatch's op library {library} is missing: build it with `pip install .` "
            "(in a source checkout: `pip install --no-build-isolation -e .`)."
        )
        raise ImportError(msg)
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except OSError as error:
        msg = (
            f"annbatch's op library {library} does not load: it found torch {torch.__version__} and needs torch "
            f"{OLDEST_TORCH} or newer, on the platform that it was built for ({error})."
        )
        raise ImportError(msg) from error


_load_library(LIBRARY)
OPS = torch.ops.annbatch
# The first call of any op makes tables of torch's own. The child of a fork in the middle of that waits for ever, so it is
# made here, before threads of the user's call ops.
OPS.version()


@atexit.register
def _close_all() -> None:
    """End reads in flight before the interpreter, and the objects whose memory they fill, are taken apart."""
    OPS.close_all.default(at_exit=True)
    # Daemon threads inside an op stay there now (cpp/interrupt.h). One that had just left it waits for the GIL with C++
    # frames on its stack, and must get it before the interpreter stops handing it out.
    if threading.active_count() > 1:
        time.sleep(0.02)
