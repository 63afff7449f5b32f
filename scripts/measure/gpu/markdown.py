"""The tables of a GPU report, ready to be pasted into docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cogvla.scripts.measure.gpu.goals import ANCHORS, GOALS
from cogvla.scripts.measure.gpu.journal import Journal
from cogvla.scripts.measure.gpu.runner import Part, number

PACKAGES = ("python", "torch", "transformers", "timm", "numpy")


def markdown(journal: Journal, parts: Mapping[str, Part], driver: str) -> str:
    """Return the report as Markdown: the machine, goals beside results, and a table for each part."""
    lines = ["## GPU report", "", *_machine(journal, driver), "", *_goals(journal, parts), ""]
    for part in parts.values():
        if journal.part(part.name)["state"]:
            lines += [f"### {part.title}", "", *_part(journal, part), ""]
    return "\n".join(lines)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: int = 1) -> list[str]:
    """Return the lines of a table; columns from number `right` on are aligned to the right."""
    rule = ["---"] * right + ["---:"] * (len(head) - right)
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


def _machine(journal: Journal, driver: str) -> list[str]:
    body: dict[str, Any] = journal.body
    machine, versions = body["machine"], body["versions"]
    tasks = [task for part in body["parts"].values() for task in part["tasks"].values()]
    commits = sorted({task["commit"] for task in tasks if task["commit"]})
    dates = sorted({task["date"] for task in tasks})
    lines = [
        f"{', '.join(machine['gpus']) or 'no GPU'}; driver {driver or '-'}; {machine['cpu']}, "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB; {machine['system']}.",
        f"{', '.join(f'{name} {versions[name]}' for name in PACKAGES if name in versions)}; "
        f"commit {', '.join(commits) or 'unknown'}; {', '.join(dates) or 'not measured'}.",
    ]
    if body["rehearse"]:
        lines.append("**A rehearsal with small stand-ins for the networks: these numbers mean nothing.**")
    return lines


def _goals(journal: Journal, parts: Mapping[str, Part]) -> list[str]:
    rows = {name: journal.rows(name) for name in parts}
    lines = []
    for goal in GOALS:
        found = goal.find(rows)
        reached = "-" if found is None or journal.body["rehearse"] else "yes" if goal.reached(found) else "no"
        bound = f"{'at most' if goal.at_most else 'at least'} {goal.bound:g} {goal.unit}"
        lines.append([goal.text, bound, number(found), reached])
    goals = table(["goal (on one H200)", "", "measured", "reached"], lines)
    anchors = table(["published, batch 1", "ms", "machine"], ANCHORS)
    return [*goals, "", *anchors]


def _part(journal: Journal, part: Part) -> list[str]:
    known = journal.part(part.name)
    rows = journal.rows(part.name)
    cells = [[row["row"], *(number(row.get(key)) for key in part.columns)] for row in rows]
    lines = table(["", *part.columns.values()], cells) if cells else ["No row was measured."]
    missing = [row for task in known["tasks"].values() for row in task["rows"] if "missing" in row]
    lines += ["", *(f"- {row['row']}: {row['missing']}" for row in missing)] if missing else []
    unfinished = f", {known['state']}: {known['note']}" if known["note"] else ""
    return [*lines, "", f"{known['seconds']:.0f} s{unfinished}."]
