"""What a report says of the engine that shall load the adapter."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text


def print_engine(console: Console, report: dict[str, Any]) -> None:
    """Whether it loads it, what was adapted, and what is left to do; nothing if none was named."""
    found = report.get("target_engine")
    if found is None:
        return
    verdict = "loads it" if found["loads"] else "does not load it"
    console.print(Text.assemble((f"{found['engine']}  ", "bold"), verdict))
    for line in found["adapted"]:
        console.print(Text.assemble(("adapted  ", "bold"), str(line)))
    for item in found["findings"]:
        console.print(Text.assemble((f"{item['level']}  ", "bold yellow"), item["message"], " ", item["remedy"]))
