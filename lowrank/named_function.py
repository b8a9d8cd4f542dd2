"""A Python function that a config names, `module:function`: found in the current folder, or among what is installed."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowrank.errors import InputError


def named_function(named: str, where: str, takes: tuple[str, ...]) -> Callable[..., Any]:
    """The function.

    Args:
        named: `module:function`.
        where: The config's key, for messages.
        takes: What it is called with, in words, one for each argument.

    Raises:
        InputError: there is no such module or function, the module does not import, or the function takes other
            arguments.
    """
    path, _, name = named.partition(":")
    if not path or not name.isidentifier():
        raise InputError(f"{named!r} names no function", where=where, fix="Write module:function.")
    module = _imported(path, named, where)
    function = getattr(module, name, None)
    if not callable(function):
        near = difflib.get_close_matches(name, [key for key, value in vars(module).items() if callable(value)], 1)
        raise InputError(
            f"{path} has no function {name!r}",
            where=where,
            fix=f"Perhaps it is {path}:{near[0]}." if near else f"Define it in {module.__file__}.",
        )
    try:
        inspect.signature(function).bind(*takes)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{named} cannot be called with ({', '.join(takes)}): {error}",
            where=where,
            fix=f"Give it {len(takes)} argument{'s' if len(takes) > 1 else ''}: {', '.join(takes)}.",
        ) from error
    return function


def source_digest(named: str, function: Callable[..., Any], where: str) -> str:
    """A hash of the function's name and of the source of its module, and of the module that names it.

    It changes when what the function does may have. A partial's own arguments are in the module that names it.

    Raises:
        InputError: it has no source.
    """
    while isinstance(function, functools.partial):
        function = function.func
    told = [named]
    for module in dict.fromkeys((named.partition(":")[0], function.__module__)):
        try:
            told.append(inspect.getsource(sys.modules[module]))
        except (OSError, TypeError, KeyError) as error:
            raise InputError(
                f"the source of {module} cannot be read ({error}), and without it a changed function could not be "
                "told from this one",
                where=where,
                fix="Define the function in a Python file.",
            ) from error
    return hashlib.blake2b("\n".join(told).encode(), digest_size=16).hexdigest()


def _imported(path: str, named: str, where: str) -> Any:
    with _current_folder_first():
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not path.startswith(error.name):
                raise _broken(path, where, error) from error
            raise InputError(
                f"there is no module {path!r}, of which {named} is to be taken",
                where=where,
                fix=f"Put {path.replace('.', '/')}.py into {Path.cwd()}, or install it.",
            ) from error
        except Exception as error:  # whatever the user's module raises
            raise _broken(path, where, error) from error


def _broken(path: str, where: str, error: Exception) -> InputError:
    return InputError(
        f"{path} does not import: {type(error).__name__}: {error}", where=where, fix=f'Try `python -c "import {path}"`.'
    )


@contextmanager
def _current_folder_first() -> Iterator[None]:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)
