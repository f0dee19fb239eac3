"""The rules' papers: what was published, beside what the same rule comes to here. A TOML file a rule.

A page holds the claim and its source, the published test accuracy, in what our setting differs, and an experiment: all
samples on one client ("central"), and the same on ten, IID, each in a tenth of the batch and so in as many steps
("federated"; a table of that name changes what it names, the batch too, and `lines` says so if there is one of the two
alone). A page is named after its rule, and further ones of it after the data too. Lines are recorded runs: ours is the
last accuracy in the run database, never a number in a file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...server.records import NotARun, read_run
from ..experiment import PARTS, Experiment, ExperimentError, choose, from_mapping
from ..run import RUNS
from ..world import resolved

FOLDER = Path(__file__).parent
RECORDED = RUNS / "papers"
OTHERS = "other settings"  # of a run that is in a line's place
LINES = {"central": {"clients": 1, "holdout": 0.0, "epochs": 1}, "federated": {"clients": 10, "epochs": 1}}


@dataclass(frozen=True)
class Page:
    """A rule's page.

    Attributes:
        name: of the file: the rule, or the rule and more.
        claim: what the paper says of its rule.
        source: where the published number stands.
        published: test accuracy there, 0 … 1; None if none was found.
        differs: how our setting is not the paper's.
        lines: an experiment each, by "central" and "federated".
    """

    name: str
    claim: str
    source: str
    published: float | None
    differs: str
    lines: dict[str, Experiment]

    @property
    def rule(self) -> str:
        """The rule that it is of."""
        return next(iter(self.lines.values())).rule


def pages(names: Iterable[str] = (), data_dir: Path | None = None) -> list[Page]:
    """Return the pages of these rules, or all.

    Args:
        names: of rules, all of whose pages are meant, or of pages.
        data_dir: folder that holds data sets under their names; else they are the hub's.

    Raises:
        ExperimentError: for a name without a page.
    """
    there = [_read(path, data_dir) for path in sorted(FOLDER.glob("*.toml"))]
    for name in names:
        choose("rule with a page", name, {known: None for page in there for known in (page.rule, page.name)})
    return [page for page in there if not names or {page.rule, page.name} & set(names)]


def rows(page: Page, runs: Path) -> list[dict[str, Any]]:
    """Return a row a line: what was published, what ours came to, and after how many rounds; None where nothing ran."""
    return [
        {"rule": page.name, "line": line, "published": page.published} | ours(asked, runs)
        for line, asked in page.lines.items()
    ]


def _read(path: Path, data_dir: Path | None) -> Page:
    values = tomllib.loads(path.read_text())
    asked, lines = values.pop("experiment"), {}
    own = values.pop("federated", {})
    for line, common in ((line, LINES[line]) for line in values.pop("lines", LINES)):
        batch = asked.get("batch-size", Experiment.batch_size) // common["clients"]
        more = {"batch-size": max(1, batch)} | (own if line == "federated" else {})
        options = {part: asked.get("set", {}).get(part, {}) | more.get("set", {}).get(part, {}) for part in PARTS}
        found = from_mapping(asked | common | more | {"name": f"{path.stem}-{line}", "set": options})
        local = data_dir / found.data if data_dir else None
        lines[line] = found.replace(data=str(local)) if local and local.exists() else found
    return Page(path.stem, values["claim"], values["source"], values.get("published"), values["differs"], lines)


def ours(asked: Experiment, runs: Path) -> dict[str, Any]:
    """Return what the run database says of a line; a run of other settings, but for the data's place, is another's."""
    found: dict[str, Any] = {"ours": None, "rounds": None, "of": asked.rounds, "status": "not run"}
    try:
        run = read_run(runs / asked.name)
    except NotARun:
        return found
    try:
        there = from_mapping(tomllib.loads(run.info["experiment"]))
    except (ExperimentError, KeyError):  # of another version
        return found | {"status": OTHERS}
    if _said(there.replace(data=asked.data, engine=asked.engine, devices=asked.devices)) != _said(resolved(asked)):
        return found | {"status": OTHERS}
    seen = run.rounds.dropna(subset="accuracy").tail(1)
    last = {"ours": float(seen["accuracy"].iloc[0]), "rounds": int(seen["round"].iloc[0])} if len(seen) else {}
    return found | last | {"status": run.info["status"]}


def _said(experiment: Experiment) -> Experiment:
    """Return an experiment without tables of options that say nothing."""
    return experiment.replace(set={part: table for part, table in experiment.set.items() if table})
