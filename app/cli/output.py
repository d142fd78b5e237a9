"""What the commands print: results on standard output, progress and errors on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

_json_wanted = False


def remember_json(value: bool) -> bool:
    """Callback of `--json`: an error is then printed as its problem document too."""
    global _json_wanted
    _json_wanted = value
    return value


def json_wanted() -> bool:
    return _json_wanted


def stdout() -> Console:
    """A console on the present standard output; made anew, since tests and pipes replace the stream."""
    return Console(highlight=False, soft_wrap=True)


def stderr() -> Console:
    return Console(stderr=True, highlight=False, soft_wrap=True)


def print_json(document: Any) -> None:
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")


def note(text: str) -> None:
    """A line for the person at the terminal that is no result; on standard error, so that pipes stay clean."""
    stderr().print(text, style="dim", markup=False)


def table(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table; numbers stand right. A column's name that begins with `#` names a column of numbers."""
    grid = Table(title=title, title_justify="left", header_style="bold", expand=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.startswith("#") else "left"
        # An id must be copyable in one piece, however narrow the terminal.
        grid.add_column(column.removeprefix("#"), justify=justify, overflow="fold", no_wrap=column == "id")
    for row in rows:
        grid.add_row(*(Text(text(cell)) for cell in row))
    return grid


def fields(title: str, values: Mapping[str, Any]) -> Table:
    """A two-column table of a thing's fields; those that are None or empty are left out."""
    grid = Table(title=title, title_justify="left", show_header=False, expand=False)
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for name, value in values.items():
        if value not in (None, "", [], {}, ()):
            grid.add_row(name, Text(text(value)))
    return grid


def text(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(text(item) for item in value)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def size(count: int | None) -> str:
    """Bytes in decimal units, as disks and networks count them."""
    if count is None:
        return "–"
    number = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def duration(seconds: float) -> str:
    """A time span to two places: 42 s, 3 min 5 s, 2 h 10 min, 4 d 3 h."""
    whole = round(seconds)
    for large, small, names in ((86400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s"))):
        if whole >= large:
            rest = whole % large // small
            return f"{whole // large} {names[0]}" + (f" {rest} {names[1]}" if rest else "")
    return f"{whole} s"


def moment(value: str | None) -> str:
    """An API time in the reader's own zone, to the second."""
    if not value:
        return "–"
    return datetime.fromisoformat(value).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def print_problem(problem: Mapping[str, Any]) -> None:
    """A problem document for people: what was wrong, each finding, and what to do."""
    console = stderr()
    code = problem.get("code") or problem.get("status") or "error"
    console.print(
        Text.assemble(("error ", "bold red"), (f"[{code}] ", "red"), str(problem.get("detail") or problem.get("title")))
    )
    for finding in problem.get("errors") or ():
        console.print(Text(f"  {finding.get('pointer') or '·'}: {finding.get('message')}"))
    if problem.get("hint"):
        console.print(Text.assemble(("hint  ", "bold"), str(problem["hint"])))
    if problem.get("request_id"):
        console.print(Text(f"request id {problem['request_id']}", style="dim"))
    if json_wanted():
        print_json(dict(problem))


def note_more(page: dict[str, Any]) -> None:
    """How to get the next page of a list, if there is one."""
    if page.get("next"):
        note(f"more: --cursor {page['next']}")
