"""The op library in a process of its own: Ctrl-C, exits, and the file itself."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from annbatch._core import library

pytestmark = pytest.mark.core

needs_binutils = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("readelf") or not shutil.which("nm"), reason="needs nm and readelf"
)

PREAMBLE = """
import os, signal, sys, threading, time
import types
import torch

# a shell that starts tests in the background has them ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)

# without the package's own imports, which would take most of the time of these tests
sys.modules["annbatch"] = types.ModuleType("annbatch")
sys.modules["annbatch"].__path__ = [{package}]
from annbatch._core import ops as _ops

config = {config}
op = torch.ops.annbatch
sent = []

def send(which):
    def later():
        time.sleep(0.33)
        sent.append(time.perf_counter())
        os.kill(os.getpid(), which)
    threading.Thread(target=later, daemon=True).start()
"""


def run(script: str, config: dict) -> subprocess.CompletedProcess:
    source = PREAMBLE.format(package=repr(str(library.LIBRARY.parent)), config=repr(config)) + textwrap.dedent(script)
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", source],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def waiting(small) -> dict:
    return small.config(sampling={"kind": "submitted"})


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("call", ["_ops.load(state)", "op.load(state)", "op.ready(state, 60_000)"])
def test_ctrl_c_ends_a_wait_within_a_fifth_of_a_second(small, call):
    script = f"""
    state = _ops.open_state(config)
    _ops.start(state, 1)
    send(signal.SIGINT)
    try:
        try:
            {call}
        except RuntimeError as error:
            # what a loop that retries would do: the interrupt must come through it
            assert "[annbatch:Interrupted]" in str(error), error
            time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted after", time.perf_counter() - sent[0])
    # the state is as it was
    row = torch.zeros(1, dtype=torch.int64)
    _ops.submit(state, row, row, row + 1)
    print("then", _ops.load(state)[0].tolist())
    """
    done = run(script, waiting(small))
    assert done.returncode == 0, done.stderr
    after = re.search(r"interrupted after (\S+)", done.stdout)
    assert after is not None, done.stdout + done.stderr
    assert float(after[1]) < 0.2
    assert "then [0]" in done.stdout


def test_a_handler_of_the_users_own_is_obeyed(small):
    script = """
    class Enough(Exception):
        pass

    calls = []
    def first_note_then_raise(*_):
        calls.append(1)
        if len(calls) == 2:
            raise Enough
    signal.signal(signal.SIGALRM, first_note_then_raise)
    state = _ops.open_state(config)
    _ops.start(state, 1)
    send(signal.SIGALRM)
    print("waited on:", op.ready(state, 800), len(calls))
    send(signal.SIGALRM)
    try:
        try:
            op.load(state)
        except RuntimeError as error:
            assert "[annbatch:Interrupted]" in str(error), error
            time.sleep(60)
    except Enough:
        print("enough after", len(calls))
    """
    done = run(script, waiting(small))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["waited on: False 1", "enough after 2"]


# ---- exits -----------------------------------------------------------------------------------------------------------
EXITS = {
    "open": "state = _ops.open_state(config)",
    "in the middle": "state = _ops.open_state(config); _ops.start(state, 1); batch = _ops.load(state)",
    "batches held": """
        state = _ops.open_state(config); _ops.start(state, 1)
        batches = [_ops.load(state) for _ in range(3)]
        sys.batches = batches; sys.state = state  # dies with the interpreter, not before
    """,
    "close_all called early": "state = _ops.open_state(config); _ops.start(state, 1); op.close_all()",
    "threads that load": """
        state = _ops.open_state({**config, "auto_restart": True})
        def go():
            while True:
                _ops.load(state)
        for _ in range(3):
            threading.Thread(target=go, daemon=True).start()
        time.sleep(0.2)
    """,
    "threads that wait": """
        state = _ops.open_state({**config, "sampling": {"kind": "submitted"}}); _ops.start(state, 1)
        for load in (_ops.load, op.load):
            threading.Thread(target=load, args=(state,), daemon=True).start()
        time.sleep(0.2)
    """,
    "a forked child": """
        state = _ops.open_state(config); _ops.start(state, 1); batch = _ops.load(state)
        child = os.fork()
        if child:
            status = os.waitpid(child, 0)[1]
            assert status == 0, status
    """,
}


@pytest.mark.parametrize("how", EXITS)
def test_exit_is_clean(small, how):
    done = run(textwrap.dedent(EXITS[how]) + "\nprint('end')", small.config())
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "end"
    assert done.stderr == ""


# ---- open files ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("direct_io", [False, True])
def test_thousands_of_datasets_are_read_with_256_open_files(small, tmp_path, direct_io):
    # links: stores of their own to the reader, and no work to write
    for number in range(3000):
        (tmp_path / f"{number:04}").symlink_to(small.paths[number % 2], target_is_directory=True)
    script = """
    import resource
    from pathlib import Path

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    folder = config.pop("folder")
    config["datasets"] = [{"path": str(path)} for path in sorted(Path(folder).iterdir())]
    state = _ops.open_state(config)
    _ops.start(state, 0)
    rows, most = [], 0
    while (batch := _ops.load(state))[0].numel():
        rows.append(batch[0])
        most = max(most, len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0)
    rows = torch.cat(rows).sort().values
    assert torch.equal(rows, torch.arange(rows.numel())), rows
    print(rows.numel(), most)
    """
    sampling = {"kind": "random", "chunk_size": 64, "preload_nchunks": 256, "batch_size": 4096}
    done = run(script, small.config(folder=str(tmp_path), sampling=sampling, direct_io=direct_io))
    assert done.returncode == 0, done.stderr
    rows, most = map(int, done.stdout.split())
    assert rows == 1500 * small.n_obs
    assert most < 256


# ---- the file --------------------------------------------------------------------------------------------------------
def _lines(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


@needs_binutils
def test_library_holds_no_python_and_needs_only_what_is_everywhere():
    undefined = {
        line.split()[-1].split("@")[0] for line in _lines("nm", "-D", "--undefined-only", str(library.LIBRARY))
    }
    assert [name for name in undefined if re.match(r"_?Py[A-Z_]", name)] == []
    assert "torch_from_blob" in undefined, "this looks at the wrong file"
    needed = {
        m[1] for line in _lines("readelf", "-d", str(library.LIBRARY)) if (m := re.search(r"NEEDED.*\[(.*)\]", line))
    }
    system = r"lib(stdc\+\+|gcc_s|c|m|dl|pthread|rt|util)\.so\.\d+|ld-linux.*"
    assert {name for name in needed if not re.fullmatch(system, name)} == {"libtorch_cpu.so"}
    dynamic = "\n".join(_lines("readelf", "-d", str(library.LIBRARY)))
    assert not re.search("RPATH|RUNPATH", dynamic)


@needs_binutils
def test_library_exports_nothing_of_its_own():
    exported = [line.split() for line in _lines("nm", "-D", "--defined-only", str(library.LIBRARY))]
    # weak and unique symbols are the C++ standard library's (type information), which must be shared
    own = [name for *_, kind, name in exported if kind not in "VvWwu"]
    assert own == []


def test_a_library_that_is_missing_or_broken_is_one_sentence(tmp_path):
    (tmp_path / "_core").mkdir()
    (tmp_path / "_core" / "library.py").write_text(Path(library.__file__).read_text())
    script = "import library"

    def attempt() -> str:
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path / "_core",
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 1
        return done.stderr.strip().splitlines()[-1]

    assert re.match(r"ImportError: annbatch's op library .*_annbatch\.so is missing: build it with `pip", attempt())
    (tmp_path / "_annbatch.so").write_bytes(b"no library")
    assert re.match(
        r"ImportError: .* does not load: it found torch \d+\.\d+.* and needs torch 2\.11 or newer", attempt()
    )
