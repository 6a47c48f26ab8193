"""What all tests need: their part of the cores."""

from __future__ import annotations

import os

import torch

# Processes of pytest-xdist share the cores: torch, and the processes that tests start, take their part each.
if (n_processes := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    n_threads = max(1, (os.cpu_count() or 1) // n_processes)
    torch.set_num_threads(n_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(n_threads))
