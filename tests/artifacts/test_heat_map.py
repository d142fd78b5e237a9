"""Tables as pictures: what stands in them, whatever the numbers and the words are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from artifacts.heat_map import DIVERGING, MISSING, SEQUENTIAL, HeatMap, pictures_of, write_pictures


def table(values: list[list[Any]], **fields: Any) -> HeatMap:
    rows = [f"row {number}" for number in range(len(values))]
    columns = [f"column {number}" for number in range(len(values[0]) if values else 0)]
    return HeatMap(**{"name": "ranks", "title": "ranks", "rows": rows, "columns": columns, "values": values} | fields)


def drawn(found: HeatMap) -> tuple[ElementTree.Element, list[ElementTree.Element], list[str]]:
    """The picture, its cells, and all its words."""
    root = ElementTree.fromstring(found.draw())
    cells = [item for item in root.iter() if item.get("class") == "cell"]
    return root, cells, ["".join(item.itertext()) for item in root.iter() if item.tag.endswith("}text")]


def test_every_number_has_its_cell_and_more_is_darker() -> None:
    _, cells, words = drawn(table([[1, 2.5], [7, None]], unit="ranks", note="of all layers"))
    assert [cell.get("fill") for cell in cells] == [SEQUENTIAL[0], SEQUENTIAL[1], SEQUENTIAL[-1], MISSING]
    assert [word for word in words if word in {"1", "2.5", "7", "–"}][:4] == ["1", "2.5", "7", "–"]
    assert {"row 0", "row 1", "column 0", "column 1", "7 ranks", "of all layers"} <= set(words)


def test_numbers_below_zero_get_a_scale_around_it() -> None:
    _, cells, words = drawn(table([[-0.5, 0, 1]]))
    assert [cell.get("fill") for cell in cells][1:] == [DIVERGING[2], DIVERGING[-1]]
    assert "-1" in words  # the scale is as long on both sides


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("columns", [1, 12])
def test_nothing_lies_outside_of_the_picture(rows: int, columns: int) -> None:
    names = [f"model.layers.{number}" for number in range(rows)]
    kinds = [f"self_attn.{'kind' * 4}_{number}" for number in range(columns)]
    values = [[float(row * column) for column in range(columns)] for row in range(rows)]
    root, cells, words = drawn(table(values, rows=names, columns=kinds, note="a note of many words " * 20))
    width, height = (float(str(root.get(name))) for name in ("width", "height"))
    assert len(cells) == rows * columns
    places = {(cell.get("x"), cell.get("y")) for cell in cells}
    assert len(places) == len(cells)
    for item in root.iter():
        right = float(item.get("x", 0)) + float(item.get("width", 0))
        assert 0 <= float(item.get("x", 0)) <= right <= width
        assert 0 <= float(item.get("y", 0)) + float(item.get("height", 0)) <= height
    assert set(names) | set(kinds) <= set(words)


@pytest.mark.parametrize(
    "values", [[[0.0]], [[3, 3]], [[None]], [[math.nan, math.inf, 1.0]], [[1e30, -1e-30]], [[2e6]]]
)
def test_a_picture_is_whole_whatever_the_numbers_are(values: list[list[Any]]) -> None:
    _, cells, words = drawn(table(values))
    assert len(cells) == len(values[0])
    assert "nan" not in words
    assert "inf" not in words


def test_words_can_not_break_out() -> None:
    words = "<script>&\"'</style>"
    found = table([[1]], title=words, rows=[words], columns=[words], unit=words, note=words)
    assert "<script" not in found.draw()
    assert drawn(found)[2].count(words) >= 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "../up"}, "no name of a picture"),
        ({"values": [[1, 2]]}, "needs 1 rows of 1 values"),
        ({"values": []}, "needs 1 rows of 1 values"),
        ({"rows": [], "values": []}, "no rows or no columns"),
    ],
)
def test_what_is_no_table_is_refused(fields: dict[str, Any], words: str) -> None:
    whole = {"name": "a", "title": "", "rows": ["r"], "columns": ["c"], "values": [[1]]}
    HeatMap(**whole)
    with pytest.raises(ValueError, match=words):
        HeatMap(**whole | fields)


def test_the_pictures_of_a_report_are_written_beside_it(tmp_path: Path) -> None:
    found = [table([[1, None]]), table([[2]], name="layer-weights")]
    own = {"ranks": {"a": 1}, "pictures": [item.to_dict() for item in found]}
    assert [item.to_dict() for item in pictures_of(own)] == own["pictures"]
    write_pictures(own, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layer-weights.svg", "ranks.svg"]
    assert (tmp_path / "ranks.svg").read_text(encoding="utf-8") == found[0].draw()
    assert pictures_of({}) == []
