"""What the benchmarks share: arguments, processes of their own, what a process holds, the machine, records."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--quick", action="store_true", help="a size that keeps this program from rotting, not a measurement"
    )
    made.add_argument("--data", type=Path, default=Path("bench-data"), help="where stores are written and kept")
    made.add_argument(
        "--record", metavar="NAME", help="write benches/record/NAME.md (and a picture where there is one)"
    )
    return made


def comparison(doc: str | None, peer: str) -> argparse.ArgumentParser:
    """Arguments of a benchmark that runs cases against `peer` in turn, each in a process of this same program."""
    made = parser(doc)
    made.add_argument("--peers", help=f"interpreter of an environment with {peer} (make peers)")
    made.add_argument("--only", default="", metavar="SUBSTRING", help="run the cases whose names contain this")
    made.add_argument("--pairs", type=int, default=3)
    made.add_argument("--seconds", type=float, default=5.0, help="timed seconds per measurement at least")
    for name in ("--task", "--case", "--path", "--sizes"):
        made.add_argument(name, help=argparse.SUPPRESS)
    made.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    return made


def spread(values: list[float], form: str = ",.0f", unit: str = "") -> str:
    """Median, smallest and largest."""
    return f"{statistics.median(values):{form}}{unit} ({min(values):{form}} … {max(values):{form}})"


def alone(program: str, *arguments: str, python: str = sys.executable, environment: dict | None = None) -> dict:
    """Run a program in a process of its own and return what it measured, the last line that it prints."""
    command = [python, program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most since it began or was told to forget.

    Unlike ``ru_maxrss``, which begins with what the parent held when it forked.
    """
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) * 1024


def machine() -> str:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "?",
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}, Python {platform.python_version()}"


def command_line() -> str:
    """How this program was called, without the paths of this machine."""
    given = [re.sub(r"[^=]*/.*", "…", argument) for argument in sys.argv[1:]]
    return " ".join([Path(sys.argv[0]).name, *given])


def write_record(name: str, about: str, text: str) -> Path:
    """Write benches/record/`name`.md: the machine, what was measured, and the text."""
    record = Path(__file__).parent / "record" / f"{name}.md"
    record.parent.mkdir(exist_ok=True)
    record.write_text(f"# {name}\n\n{machine()}\n\n{about}\n\n{text}\n")
    print(f"written: {record}")
    return record
