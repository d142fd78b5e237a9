"""An image and its evidence as files: the recipe inside the PNG, masks, the loss trace, a sheet of several."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from compose.composition import Composition
from compose.contact_sheet import GAP, contact_sheet
from compose.evidence_files import write_files
from compose.loss_trace import draw
from compose.recipe import read_recipe, save_png

RECIPE = {"prompt": "ein Käfer — 2", "seed": 3}


def updates(count: int = 6) -> list[dict[str, float]]:
    return [
        {"step": index // 3, "repeat": index % 3, "before": 1.0 / (index + 1), "after": 0.1}
        for index in range(count)
    ]  # fmt: skip


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (32, 24)) -> Image.Image:
    return Image.new("RGB", size, colour)


def test_a_png_carries_its_recipe_and_is_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("first.png", "second.png"):
        save_png(picture((1, 2, 3)), tmp_path / name, RECIPE)
    assert read_recipe(tmp_path / "first.png") == RECIPE
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()
    picture((1, 2, 3)).save(tmp_path / "plain.png")
    assert read_recipe(tmp_path / "plain.png") is None


def test_every_piece_of_evidence_is_a_file_with_a_name_of_its_own(tmp_path: Path) -> None:
    masks = {
        "Hot Dog": [(0, picture((0, 0, 0))), (3, picture((9, 9, 9)))],
        "hot dog": [(0, picture((7, 7, 7)))],
        "犬": [(0, picture((5, 5, 5)))],
    }
    found = Composition(picture((1, 2, 3)), {"updates": updates()}, masks, {"overlay": picture((4, 4, 4))})
    files = write_files(found, RECIPE, tmp_path / "out")
    assert [file.path.name for file in files] == [
        "image.png",
        "mask-1-hot-dog-step-0.png",
        "mask-1-hot-dog-step-3.png",
        "mask-2-hot-dog-step-0.png",
        "mask-3-x-step-0.png",
        "overlay.png",
        "loss.svg",
    ]
    assert [file.role for file in files] == ["image", *["mask"] * 4, *["picture"] * 2]
    assert files[2].details == {"concept": "Hot Dog", "step": 3}
    assert all(file.path.is_file() for file in files)
    none = Composition(picture((1, 2, 3)), {"updates": []})
    assert [file.path.name for file in write_files(none, RECIPE, tmp_path / "none")] == ["image.png"]


@pytest.mark.parametrize("count", [1, 2, 60])
def test_the_trace_shows_every_update_inside_the_picture(count: int) -> None:
    root = ElementTree.fromstring(draw(updates(count)))
    dots = root.findall("{http://www.w3.org/2000/svg}circle")
    assert len(dots) == count
    assert all(0 <= float(dot.attrib["cx"]) <= 720 and 0 <= float(dot.attrib["cy"]) <= 320 for dot in dots)
    heights = [float(dot.attrib["cy"]) for dot in dots]
    assert heights == sorted(heights), "a loss that falls goes down"
    steps = [line for line in root.findall("{http://www.w3.org/2000/svg}line") if line.attrib["class"] == "step"]
    assert len(steps) == -(-count // 3)


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (4, 4, 1), (5, 3, 2), (12, 4, 3)])
def test_a_sheet_has_each_image_once_whole(count: int, columns: int, rows: int) -> None:
    images = [(f"method {index} with a long name", picture((20 * index, 0, 255))) for index in range(count)]
    sheet = contact_sheet(images)
    assert sheet.width == columns * (32 + GAP) + GAP
    band = (sheet.height - GAP) // rows - 24 - GAP
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = GAP + column * (32 + GAP), GAP + row * (24 + band + GAP) + band
        assert sheet.crop((x, y, x + 32, y + 24)).tobytes() == images[index][1].tobytes()
        label = sheet.crop((x, y - band, x + 32, y))
        assert label.getcolors(1) is None, "there is something written"
        gap = sheet.crop((x + 32, y - band, x + 32 + GAP, y))
        assert gap.getcolors(1) is not None, "and it ends where the image does"
