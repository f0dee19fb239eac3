"""What is said of data that does not exist or does not fit: one line that names the remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DataError(ValueError):
    """A data set, column or partition that does not exist or does not fit; one line that names the remedy."""


def require(what: str, name: str, known: Iterable[str], option: str) -> None:
    """Raise DataError if there is no `what` called `name` among those `known`; `option` tells how to name one."""
    known = list(known)
    if name not in known:
        raise DataError(f"no {what} '{name}' among {listed(known)}{near(name, known)}: --set {option}")


def closest(word: str, known: Iterable[str]) -> str:
    """Return up to three names close to `word` or holding it, as "a or b", or nothing."""
    known = list(known)
    holding = [name for name in known if len(word) > 2 and word.lower() in name.lower()]
    return " or ".join(list(dict.fromkeys(difflib.get_close_matches(word, known, n=2) + holding))[:3])


def near(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean …?)" with the names closest to `word`, or nothing."""
    names = closest(word, known)
    return f" (did you mean {names}?)" if names else ""


def listed(names: Iterable[str]) -> str:
    """Return names in words, the first dozen of them."""
    names = list(names)
    return (", ".join(names[:12]) or "none") + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def one_line(error: BaseException) -> str:
    """Return what an exception says on one line of at most 200 characters."""
    return " ".join(str(error).split())[:200] or type(error).__name__
