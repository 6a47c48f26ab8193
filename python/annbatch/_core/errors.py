"""Exceptions of Python for the errors that ops raise: class by kind, text without the kind."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NoReturn, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


class DataError(RuntimeError):
    """The stored data contradict themselves or cannot be decoded; the message names dataset, array and chunk."""


_PREFIXED = re.compile(r"\[annbatch:(?P<kind>\w+)\] (?P<message>.*)", re.DOTALL)

CLASSES: dict[str, type[BaseException]] = {
    "InvalidArgument": ValueError,
    "InvalidConfig": ValueError,
    "NotFound": FileNotFoundError,
    "Unsupported": TypeError,
    "Corrupt": DataError,
    "Io": OSError,
    "Closed": RuntimeError,
    "Budget": MemoryError,
    "Device": RuntimeError,
    "Interrupted": KeyboardInterrupt,
    "Internal": RuntimeError,
}


def python_error(error: RuntimeError) -> BaseException:
    """Exception that stands for what an op raised: class by kind, text without the kind; `error` if it has none."""
    match = _PREFIXED.search(str(error))
    if match is None or match["kind"] not in CLASSES:
        return error
    return CLASSES[match["kind"]](match["message"])


def _reraise(error: RuntimeError) -> NoReturn:
    converted = python_error(error)
    if converted is error:
        raise error
    raise converted from None


def call(op: Callable[_Arguments, _Result], *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
    """Call an op; what it raises becomes the Python exception of its kind."""
    try:
        return op(*args, **kwargs)
    except RuntimeError as error:
        _reraise(error)
