"""The order of the package's modules: each imports only what stands before it, and leaves privates of others alone.

Imports are read from the source, those within functions and for type checkers alike: none may point the other way.
"""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

# found without importing it, which a circle may keep from working
PACKAGE = Path(find_spec("annbatch").origin).parent

# From what knows nothing of the others to what knows all of them. A package stands behind its modules. A new module gets its
# place here.
ORDER = re.findall(
    r"\S+",
    """
    compat types
    _base.sizes _base.warn _base
    transforms convert nn
    abc.sampler abc
    samplers._utils samplers._chunk_sampler samplers._random_sampler samplers._sequential_sampler samplers._distributed_sampler
    samplers._class_samplers._runs samplers._class_samplers._class_sampler samplers._class_samplers._weighted_class_sampler
    samplers._class_samplers samplers
    _core.library _core.errors _core.fakes _core.ops _core.requests _core.passes _core.session _core
    _data.attributes _data.places _data.remedies _data.collections _data.hdf5 _data.stored _data.aligned _data.sources
    _data.joins _data.labels _data.datasets _data.description _data.opening _data
    utils
    io._sizes io._sharded io._frames io._checks io._opening io._keys io._joining io._inputs io._collection io
    _output.batch _output.obs _output.options _output.form _output.reader _output
    loader _open
    _splits.rows _splits.splits _splits.sampler _splits.loader _splits.sources _splits
    lightning
    """,
)

# Modules of other rooms whose names begin with an underscore, and what is private to other packages: all that is used, and why.
SHARED = {"samplers._utils": "a path of scverse annbatch, whose users import it too"}
OF_OTHER_PACKAGES = {
    "_base.warn: sys._getframe": "documented by Python, as a detail of CPython",
    "loader: sys._getframe": "documented by Python, as a detail of CPython",
    "_core.fakes: torch._library.effects": "torch has no other way to say that loads are in order; done without where it is missing",
    "_core.fakes: torch.library._register_effectful_op": "the same",
    "_core.fakes: op._tags": "tags of an op that C++ has defined can be set in no other way",
    "_core.fakes: torch._ops": "the type of an op, for type checkers",
    "_core.passes: profiler._is_profiler_enabled": "asked for each batch; taken as false where it is missing",
    "_data.datasets: adata.file._file": "whether a path still names the file that anndata holds; taken as true where it is missing",
    "_data.sources: store._store": "zarr's LoggingStore gives the store that it wraps in no other way",
    "_output.batch: torch.utils._pytree": "torch has no other way to register a container",
    "_output.batch: torch.utils.data._utils.collate": "documented by torch for containers of one's own",
    "io._opening: x._meta": "documented by dask",
    "io._sizes: element._meta": "documented by dask",
    "io._sharded: elem._to_backed": "the arrays of anndata's CSRDataset without their contents; done without where it is missing",
}


# Functions that read or set an attribute by its name.
BY_NAME = {"delattr", "getattr", "hasattr", "setattr"}


def sources() -> dict[str, str]:
    """Text of each module, by its name within the package; that of the package itself is empty."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text()
    return found


def imported(module: str, tree: ast.Module, modules: set[str]) -> list[tuple[int, str, str]]:
    """Line, module (or package) and name of all that a module imports, anywhere in it; the name is empty for a module."""
    package = [] if module == "" else ("annbatch." + module).split(".")
    if module not in {name.rpartition(".")[0] for name in modules}:
        package = package[:-1]
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package or ["annbatch"]
            above = base[: len(base) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{origin}.{alias.name}"
                found.append(
                    (node.lineno, whole, "")
                    if whole.removeprefix("annbatch.") in modules
                    else (node.lineno, origin, alias.name)
                )
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def room(module: str) -> str:
    return module.split(".")[0]


def wrong_imports(texts: dict[str, str]) -> list[str]:
    """What is said of each import against the order, and of each that is private to another room or package."""
    places = {module: place for place, module in enumerate([*ORDER, ""])}
    said = []
    for module in texts.keys() & places.keys():
        for line, origin, name in imported(module, ast.parse(texts[module]), set(texts)):
            who = f"annbatch.{module}, line {line}, imports"
            if origin != "annbatch" and not origin.startswith("annbatch."):
                private = f"{origin}.{name}" if is_private(name) else origin
                if any(map(is_private, private.split("."))) and f"{module}: {private}" not in OF_OTHER_PACKAGES:
                    said.append(f"{who} {private}, which is private there: say why in OF_OTHER_PACKAGES")
                continue
            target = origin.removeprefix("annbatch").removeprefix(".")
            is_hidden = is_private(name) or any(map(is_private, target.split(".")[1:]))
            if target not in places or places[target] >= places[module]:
                before = "a module imports only what stands before it in the order"
                said.append(f"{who} {target or 'annbatch itself'}, but {before}: {' '.join(ORDER)}")
            elif is_hidden and room(target) != room(module) and target not in SHARED:
                said.append(f"{who} {f'{target} {name}'.strip()}, which is private to {room(target)}")
    return said


def wrong_reads(texts: dict[str, str]) -> list[str]:
    """What is said of each private attribute that is read of something other than ``self``, and not defined in the same module."""
    said = []
    for module, text in texts.items():
        tree = ast.parse(text)
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_stored_in_self(node)}
        for node in ast.walk(tree):
            read = None
            if isinstance(node, ast.Attribute) and not _is_of_self(node.value):
                read = node.value, node.attr
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in BY_NAME:
                holder, name, *_ = node.args
                if isinstance(name, ast.Constant) and not _is_of_self(holder):
                    read = holder, name.value
            if read is not None and is_private(read[1]) and read[1] not in own:
                what = f"{ast.unparse(read[0])}.{read[1]}"
                if f"{module}: {what}" not in OF_OTHER_PACKAGES:
                    said.append(f"annbatch.{module}, line {node.lineno}, reads {what}, private to another module")
    return said


def _is_of_self(node: ast.expr) -> bool:
    return (isinstance(node, ast.Name) and node.id in ("self", "cls")) or (
        isinstance(node, ast.Call) and getattr(node.func, "id", "") == "super"
    )


def _is_stored_in_self(node: ast.Attribute) -> bool:
    return isinstance(node.ctx, ast.Store) and _is_of_self(node.value)


def test_each_module_has_one_place_in_the_order():
    assert sorted(ORDER) == sorted(set(sources()) - {""})


def test_modules_import_only_what_stands_before_them():
    assert wrong_imports(sources()) == []


def test_no_module_reads_what_is_private_to_another():
    assert wrong_reads(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "says"),
    [
        (
            "_core.passes",
            "from annbatch.loader import Loader",
            "annbatch._core.passes, line 1, imports loader, but .* order: compat",
        ),
        ("_core.passes", "def f():\n    import annbatch._data.joins", "_core.passes, line 2, imports _data.joins, but"),
        ("types", "if TYPE_CHECKING:\n    from annbatch import loader", "types, line 2, imports loader, but"),
        ("io._sizes", "from ._frames import read_frame", "io._sizes, line 1, imports io._frames, but"),
        ("abc", "from .. import samplers", "abc, line 1, imports samplers, but"),
        ("compat", "import annbatch", "compat, line 1, imports annbatch itself, but"),
        ("lightning", "from annbatch.io._sizes import parse_size", "io._sizes parse_size, which is private to io"),
        ("lightning", "from annbatch.loader import _x", "loader _x, which is private to loader"),
        (
            "nn",
            "from torch._inductor import config",
            "nn, line 1, imports torch._inductor, which is private there",
        ),
    ],
)
def test_a_wrong_import_is_told(module: str, line: str, says: str):
    (said,) = wrong_imports({**sources(), module: line})
    assert re.search(says, said)


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("loader._datasets", 1),
        ("loader._batch_sampler = sampler", 1),
        ("self._reader._session", 1),
        ("getattr(loader, '_datasets', None)", 1),
        ("self._datasets; cls._count; super()._add(); x.__dict__", 0),
        ("class A:\n    def twin(self, other):\n        self._x = other._x", 0),
    ],
)
def test_a_read_of_anothers_privates_is_told(text: str, n: int):
    said = wrong_reads({"_open": text})
    assert len(said) == n
    assert all("annbatch._open, line 1, reads " in each for each in said)


def test_what_is_excepted_is_there():
    texts = sources()
    for place in OF_OTHER_PACKAGES:
        module, _, what = place.partition(": ")
        assert what.rpartition(".")[2] in texts[module], place
