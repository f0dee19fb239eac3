"""The rules in words: what `fedforward rules` lists, and the whole page of one of them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..algorithms import RULES, Rule
from .papers.pages import RECORDED, Page, pages, rows

ATTRIBUTE = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)  # of a docstring: its name and what is said


def facts(rule: type[Rule] | Rule) -> dict[str, Any]:
    """Return what a rule says of itself in a row."""
    return {
        "name": rule.name or _class(rule).__name__,
        "family": rule.family,
        "travels": rule.travels,
        "autograd": rule.autograd,
        "paper": rule.paper,
        "lr": rule.lr,
    }


def page(rule: type[Rule] | Rule) -> dict[str, Any]:
    """Return a rule whole: its facts, the equations its file opens with, what it stores, and its options' defaults."""
    return facts(rule) | {
        "papers": [_paper(each) for each in pages() if each.rule == rule.name],
        "equations": inspect.getdoc(sys.modules[_class(rule).__module__]) or "",
        "description": inspect.getdoc(_class(rule)) or "",
        "options": {field.name: _value(rule, field) for field in dataclasses.fields(rule) if field.name != "lr"},
        "inherited": _inherited(_class(rule)),
    }


def _inherited(rule: type[Rule]) -> dict[str, str]:
    """Return what the options mean that the rule's own description does not tell, as the classes above it tell it."""
    told: dict[str, str] = {}
    for above in reversed(rule.__mro__[1:]):
        attributes = (inspect.cleandoc(above.__doc__ or "") + "\n").partition("\nAttributes:\n")[2]
        told |= {name: " ".join(words.split()) for name, words in ATTRIBUTE.findall(attributes)}
    own = {name for name, _ in ATTRIBUTE.findall(inspect.getdoc(rule) or "")}
    return {field.name: told[field.name] for field in dataclasses.fields(rule) if field.name in told.keys() - own}


def _paper(page: Page) -> dict[str, Any]:
    """Return what was published, and what our recorded runs of the same came to, by line; None where none is here."""
    told = {row["line"]: row["ours"] for row in rows(page, RECORDED)}
    command = f"fedforward papers {page.name}" + " --run" * (None in told.values())
    return {"published": page.published, "source": page.source, "ours": told, "command": command}


def _value(rule: type[Rule] | Rule, field: dataclasses.Field) -> Any:
    """Return an option as it is set, or its default; in words if JSON has no such thing."""
    made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    value = made if isinstance(rule, type) else getattr(rule, field.name)
    return value if isinstance(value, str | int | float | bool | list | tuple | None) else str(value)


def _class(rule: type[Rule] | Rule) -> type[Rule]:
    return rule if isinstance(rule, type) else type(rule)


def page_text(said: dict[str, Any]) -> str:
    """Return a rule's page as text, no line of which is folded."""
    options = [("--lr", said["lr"]), *((f"--set rule.{name}=", value) for name, value in said["options"].items())]
    width = max(len(name) for name, _ in options)
    inherited = [f"    {name}: {words}" for name, words in said["inherited"].items()]
    return "\n\n".join([
        f"{said['name']}: {said['paper'] or 'no paper is named'}\n"
        f"sends {said['travels']}; autograd: {said['autograd']}",
        *map(_paper_text, said["papers"]),
        said["equations"],
        said["description"],
        "\n".join(["Options and their defaults:", *(f"    {name:<{width}}  {value}" for name, value in options)]),
        *(["\n".join(["Options that it shares with others:", *inherited])] if inherited else []),
    ])  # fmt: skip


def _paper_text(told: dict[str, Any]) -> str:
    """Return what was published and what ours came to, in three lines."""
    percent = lambda part: "no number" if part is None else f"{100 * part:.2f} %"  # noqa: E731
    ours = ", ".join(f"{line} {percent(part)}" for line, part in told["ours"].items() if part is not None)
    return (
        f"published: {percent(told['published'])} ({told['source']})\n"
        f"ours:      {ours or 'not run here'}\n           {told['command']}"
    )


def print_list(console: Console) -> None:
    """Print all built-in rules, by family."""
    width = max(map(len, RULES))
    for family, members in groupby(RULES.values(), key=lambda rule: rule.family):
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=width, style="bold", no_wrap=True)
        for rule in members:
            said = f"sends {rule.travels}; autograd: {rule.autograd}"
            table.add_row(rule.name, Text.assemble(said, "\n", (rule.paper, "dim")))
        console.print(Text(family, "cyan"), table, "", sep="\n", highlight=False)
