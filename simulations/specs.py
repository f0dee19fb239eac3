"""What is asked of a partition: a name, and its argument after a colon."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from .refusal import DataError, near


class Takes(NamedTuple):
    """The argument that a partition takes."""

    default: str | None  # the argument when none is given; None: it takes none
    kind: type = str


def parse(spec: str, known: Mapping[str, Takes]) -> tuple[str, Any]:
    """Return a partition's name and argument: "dirichlet:0.3" -> ("dirichlet", 0.3).

    Raises:
        DataError: for a name that is not known, with the near ones, or an argument that is none.
    """
    name, colon, text = spec.partition(":")
    if name not in known:
        raise DataError(f"no partition '{name}'{near(name, known)}: take one of {', '.join(known)}")
    default, kind = known[name]
    if default is None and colon:
        raise DataError(f"partition {name} takes no argument: write {name}, not {spec}")
    try:
        value = kind(text or default or "")
        if kind is float and not math.isfinite(value):
            raise ValueError
        return name, value
    except ValueError:
        raise DataError(f"partition {spec}: '{text}' is no {kind.__name__}: write {name}:{default}") from None
