"""The figures of docs/formats.md: `make formats-report` measures, prints and checks them; ARGS=--write keeps them.

Four things, of every family of the corpus or every format that is written: what becomes of each layout, ΔW beside
diffusers' and PEFT's, the time to tell a file's layout from its header, and what a way out and in again loses.
"""

from __future__ import annotations

import json
import re
import sys
import time
import timeit
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from artifacts.identification import identify
from artifacts.safetensors_header import SafetensorsHeader, TensorInfo
from scripts.formats_report import header_of, layouts, report

FIGURES = Path(__file__).parent / "formats_figures.json"
MAX_DIFFERENCE = 1e-5
MAX_LOSS = 1e-6
"""Of a round trip in float32."""
KEYS = 3000
MAX_MILLISECONDS = 5.0
_RUNS = 9

Figures = Mapping[str, Any]


def measured() -> dict[str, Any]:
    """Everything that takes more than the headers of the corpus: minutes."""
    from scripts.formats_engines import comparisons
    from scripts.formats_round_trips import all_round_trips

    engines: dict[str, dict[str, Any]] = defaultdict(lambda: {"diffusers": 0, "PEFT": 0, "largest": 0.0})
    for name, found in comparisons().items():
        family = engines[name.partition("/")[0]]
        family[found.engine] += 1
        family["largest"] = max(family["largest"], _short(found.difference))
    trips: dict[str, dict[str, Any]] = defaultdict(lambda: {"layouts": 0, "float32": 0.0, "bfloat16": 0.0})
    for trip in all_round_trips():
        entry = trips[trip.layout]
        entry["layouts"] += trip.dtype == "float32"
        entry[trip.dtype] = max(entry[trip.dtype], _short(trip.difference))
    return {"engines": engines, "identification": identification(), "round_trips": trips}


def identification() -> dict[str, float]:
    """Family → milliseconds of one core to tell the layout of a file of `KEYS` keys, by the family's largest."""
    largest: dict[str, Any] = {}
    for name, layout in layouts().items():
        family = name.partition("/")[0]
        if len(layout["tensors"]) > len(largest.get(family, {"tensors": ()})["tensors"]):
            largest[family] = layout
    return {family: _milliseconds(header_of(layout)) for family, layout in largest.items()}


def _milliseconds(header: SafetensorsHeader) -> float:
    made = [_of_many_keys(header, run) for run in range(_RUNS)]  # other names each time: nothing is remembered
    timer = timeit.Timer(lambda: identify(made.pop()), timer=time.process_time)
    return round(1000 * min(timer.repeat(_RUNS, 1)), 1)  # what else the machine does only adds to it


def _of_many_keys(header: SafetensorsHeader, run: int) -> SafetensorsHeader:
    """A header of `KEYS` keys: the same names with other numbers."""
    tensors: dict[str, TensorInfo] = {}
    copy = 100 * run
    while len(tensors) < KEYS:
        copy += 1
        for key, info in list(header.tensors.items())[: KEYS - len(tensors)]:
            name = re.sub(r"\d+", lambda number: str(int(number[0]) + 1000 * copy), key, count=1)  # noqa: B023
            tensors[name if name != key else f"{copy}.{key}"] = info
    return SafetensorsHeader(tensors, header.metadata, 0, header.data_start)


def _short(value: float) -> float:
    return float(f"{value:.1e}")


def _shown(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def engines_table(figures: Figures) -> str:
    """Family → layouts compared with diffusers and PEFT, and the largest difference; milliseconds."""
    lines = [
        f"| family | compared with diffusers | with PEFT | largest difference | ms for {KEYS:,} keys |",
        "| --- | --- | --- | --- | --- |",
    ]
    engines = figures["engines"]
    for family, milliseconds in figures["identification"].items():
        found = engines.get(family, {"diffusers": 0, "PEFT": 0})
        largest = _shown(found["largest"]) if family in engines else "–"
        lines.append(f"| {family} | {found['diffusers']} | {found['PEFT']} | {largest} | {milliseconds:.1f} |")
    sums = [sum(found[name] for found in engines.values()) for name in ("diffusers", "PEFT")]
    worst = max(found["largest"] for found in engines.values())
    slowest = max(figures["identification"].values())
    lines.append(f"| **all** | {sums[0]} | {sums[1]} | {_shown(worst)} | {slowest:.1f} |")
    return "\n".join(lines)


def round_trips_table(figures: Figures) -> str:
    """Format → layouts that it can hold, and the largest relative difference of ΔW of a module."""
    lines = ["| format | layouts | float32 | bfloat16 |", "| --- | --- | --- | --- |"]
    for name, found in figures["round_trips"].items():
        lines.append(f"| `{name}` | {found['layouts']} | {_shown(found['float32'])} | {_shown(found['bfloat16'])} |")
    return "\n".join(lines)


def kept_figures() -> Figures:
    """Those that the documentation shows."""
    found: Figures = json.loads(FIGURES.read_text(encoding="utf-8"))
    return found


def faults(figures: Figures) -> list[str]:
    """What is not as promised."""
    found = [
        f"{family}: ΔW differs by {item['largest']:.1e}"
        for family, item in figures["engines"].items()
        if item["largest"] > MAX_DIFFERENCE
    ]
    found += [
        f"{name}: a round trip in float32 loses {item['float32']:.1e}"
        for name, item in figures["round_trips"].items()
        if item["float32"] > MAX_LOSS
    ]
    return found


def main() -> int:
    text, rows = report()
    sys.stdout.write(f"{text}\n\n")
    for row in rows:
        if row.outcome != "accepted":
            sys.stdout.write(f"{row.outcome:9} {row.name}: {row.reason[:200]}\n")
    figures = measured()
    tables: tuple[Callable[[Figures], str], ...] = (engines_table, round_trips_table)
    for made in tables:
        sys.stdout.write(f"\n{made(figures)}\n")
    for family, milliseconds in figures["identification"].items():
        if milliseconds > MAX_MILLISECONDS:  # another machine, or a busy one, is no fault of the code
            sys.stdout.write(f"\n{family}: {milliseconds} ms to tell a layout, the goal is {MAX_MILLISECONDS:g}\n")
    found = faults(figures) + [f"{row.name}: {row.reason}" for row in rows if row.outcome == "silent"]
    sys.stdout.writelines(f"NOT HELD  {fault}\n" for fault in found)
    if "--write" in sys.argv[1:]:
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
