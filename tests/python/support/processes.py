"""Code in a Python of its own, which may crash, hang or run out of memory without harm to the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import annbatch

_PATHS = [Path(__file__).parents[1], Path(annbatch.__file__).parents[1]]


def run_python(code: str, *arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """Run code that may import annbatch and `support`; what it prints is text, and its exit code is not looked at."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, _PATHS))},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
