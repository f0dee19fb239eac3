"""What a name stands for, built in or a user's `module:object` or `path/to/file.py:object`, and its options."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from .experiment import ExperimentError, choose


def is_reference(name: str) -> bool:
    """Return whether a name is `module:object` or `file.py:object`."""
    module, colon, attribute = name.rpartition(":")
    return bool(colon) and attribute.isidentifier() and bool(module) and (module.endswith(".py") or "/" not in module)


def named(what: str, name: str, known: Mapping[str, Any]) -> Any:
    """Return what a built-in name or a `module:object` stands for.

    Raises:
        ExperimentError: for an unknown name (with the near ones), module or object.
    """
    if not is_reference(name):
        choose(what, name, known)
        return known[name]
    module_name, _, attribute = name.rpartition(":")
    try:
        module = _import(module_name)
    except (Exception, SystemExit) as error:
        raise ExperimentError(
            f"{what} '{name}': cannot import {module_name} ({type(error).__name__}: {error});"
            f" name a module that Python finds from here, or a file as path/to/file.py:{attribute}"
        ) from error
    if not hasattr(module, attribute):
        there = [key for key in vars(module) if not key.startswith("_")]
        choose(f"object in {module_name}", attribute, there)
    return getattr(module, attribute)


def _import(name: str) -> Any:
    """Import a module by name, from the current folder too, or a file by its path."""
    if not name.endswith(".py"):
        if "" not in sys.path and str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        return importlib.import_module(name)
    path = Path(name).resolve()
    if not path.is_file():
        raise ImportError("there is no such file")
    # No other module's name, and the same in a process that resumes and unpickles what the module defines.
    alias = re.sub(r"\W", "_", path.stem) + "_" + sha256(str(path).encode()).hexdigest()[:8]
    if alias not in sys.modules:
        spec = importlib.util.spec_from_file_location(alias, path)
        sys.modules[alias] = importlib.util.module_from_spec(spec)
        sys.path.append(str(path.parent))  # what lies beside the file can be imported, as from a script
        try:
            spec.loader.exec_module(sys.modules[alias])
        except BaseException:
            del sys.modules[alias]
            raise
    return sys.modules[alias]


def checked_options(
    part: str, make: Callable[..., Any], options: Mapping[str, Any], given: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Return `options` if `make` takes them, with whole numbers made floats where a float is the default.

    Raises:
        ExperimentError: for an option that `make` does not take, with the near ones, or of another type than its
            default.
    """
    parameters = {k: p for k, p in inspect.signature(make).parameters.items() if k not in given}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        for base in inspect.getmro(make) if isinstance(make, type) else ():
            parameters |= inspect.signature(base.__init__).parameters
    names = [k for k, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) and k != "self"]
    result = {}
    for key, value in options.items():
        choose(f"option of {part}", key, names)
        default = parameters[key].default
        if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        kind = list if isinstance(default, tuple) else type(default)  # TOML has no tuples
        if kind in (bool, int, float, str, list) and type(value) is not kind:
            default = list(default) if kind is list else default
            raise ExperimentError(
                f"option {part}.{key} must be of type {kind.__name__} (default {default!r}), not {value!r}"
            )
        result[key] = value
    return result
