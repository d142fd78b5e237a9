"""The contact sheet: one line for each method, one column for each seed.

python -m examples.shapes_sd.sheet docs/explanation/composition.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from compose.pipelines import PipelineCache
from examples.shapes_sd.runs import CLORA_ROW, COMPOSITE, FREEFUSE, GREEN, MASK_ONLY, MERGES, SWITCH, make, request_of

ROWS = (*MERGES[::2], SWITCH, COMPOSITE, FREEFUSE, MASK_ONLY, CLORA_ROW)
SEEDS = range(2000, 2008)
CELL, GAP, LABEL = 64, 6, 118
RIGHT, WRONG = (40, 140, 70), (190, 60, 50)


def draw_sheet(seeds: Sequence[int] = SEEDS) -> Image.Image:
    """Each picture with a bar under it: green where both concepts are there and nothing else."""
    size = (LABEL + len(seeds) * (CELL + GAP), len(ROWS) * (CELL + 2 * GAP) + GAP)
    sheet = Image.new("RGB", size, "white")
    pen, pipelines = ImageDraw.Draw(sheet), PipelineCache()
    for line, row in enumerate(ROWS):
        top = GAP + line * (CELL + 2 * GAP)
        pen.text((GAP, top + CELL // 2 - 6), row.name.replace("τ", "tau"), fill="black")
        for column, seed in enumerate(seeds):
            made = make(request_of(GREEN, row, seed), GREEN.wanted, pipelines)
            left = LABEL + column * (CELL + GAP)
            sheet.paste(made.composition.image.resize((CELL, CELL), Image.Resampling.NEAREST), (left, top))
            bar = (left, top + CELL + 1, left + CELL - 1, top + CELL + 3)
            pen.rectangle(bar, fill=RIGHT if made.score.clean else WRONG)
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    torch.set_num_threads(1)
    draw_sheet().save(parser.parse_args().path, optimize=True)


if __name__ == "__main__":
    main()
