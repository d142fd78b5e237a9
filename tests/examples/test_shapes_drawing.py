"""Pictures, captions, tokens and the scorer of ShapesSD."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from examples.shapes_sd.concepts import LESSONS, SINGLE_EVERY, write_dataset
from examples.shapes_sd.drawing import (
    BACKGROUND,
    FILLERS,
    HUES,
    Shape,
    caption,
    colour_word,
    draw,
    phrase,
    random_shapes,
)
from examples.shapes_sd.scorer import GREEN_SQUARE, MAGENTA_CIRCLE, components, label, score
from examples.shapes_sd.tokenizer import WORDS, byte_letters, make_tokenizer


def _circle(hue: str, x: float = 10.0, y: float = 10.0) -> Shape:
    return Shape("circle", HUES[hue], x, y, 5.5)


def _square(hue: str, x: float = 23.0, y: float = 22.0) -> Shape:
    return Shape("square", HUES[hue], x, y, 5.5)


def test_the_scorer_finds_exactly_what_is_drawn() -> None:
    random = np.random.default_rng(9)
    for _ in range(400):
        scene = random_shapes(random)
        found = components(draw(scene))
        assert sorted(item.kind for item in found) == sorted(shape.kind for shape in scene)
        for shape in scene:
            match = next(item for item in found if item.kind == shape.kind)
            assert match.has_hue(shape.hue)
            assert colour_word(match.hue) == colour_word(shape.hue)
            assert abs(match.x - shape.x) < 0.5
            assert abs(match.y - shape.y) < 0.5


def test_the_scorer_sees_on_another_ground() -> None:
    scene = [_circle("magenta"), _square("green")]
    assert score(draw(scene, 0.3), MAGENTA_CIRCLE, GREEN_SQUARE).clean


@pytest.mark.parametrize(
    ("scene", "expected"),
    [
        ([_circle("magenta"), _square("green")], (True, True, True, False, False, True)),
        ([_circle("magenta"), _square("red")], (True, False, False, False, False, False)),
        ([_circle("magenta"), _square("magenta")], (True, False, False, True, False, False)),
        ([_circle("green"), _square("magenta")], (False, False, False, True, False, False)),
        ([_square("green")], (False, True, False, False, True, False)),
        ([], (False, False, False, False, True, False)),
        ([_circle("magenta"), _square("green"), _circle("red", 24.0, 7.5)], (True, True, True, False, True, False)),
    ],
)
def test_scores_by_hand(scene: list[Shape], expected: tuple[bool, ...]) -> None:
    found = score(draw(scene), MAGENTA_CIRCLE, GREEN_SQUARE)
    assert (found.first, found.second, found.both, found.leak, found.count_error, found.clean) == expected


def test_components_hang_together_by_edges_and_not_by_corners() -> None:
    mask = np.array([[1, 0, 0], [0, 1, 1], [0, 0, 1]], dtype=bool)
    assert label(mask).tolist() == [[1, 0, 0], [0, 2, 2], [0, 0, 2]]


def test_what_is_no_shape_is_called_other() -> None:
    picture = draw([])
    picture[4, 2:30] = (0.9, 0.1, 0.1)
    assert [item.kind for item in components(picture)] == ["other"]


def test_a_shape_covers_the_area_of_its_radius() -> None:
    for shape in (_circle("red"), _square("red")):
        assert shape.mask().sum() == pytest.approx(np.pi * 5.5**2, rel=0.06)
    corner = draw([_circle("red")])[0, 0]
    assert corner == pytest.approx([BACKGROUND] * 3)


def test_captions_have_their_shares() -> None:
    random = np.random.default_rng(3)
    scene = [_circle("red"), _square("blue")]
    captions = [caption(random, scene).split() for _ in range(4000)]
    before = [word for words in captions for word, noun in pairwise(words) if noun in ("circle", "square")]
    shares = {word: before.count(word) / len(before) for word in ("a", "red", "blue", "sks", "zwx")}
    assert shares == pytest.approx({"a": 0.45, "red": 0.19, "blue": 0.19, "sks": 0.085, "zwx": 0.085}, abs=0.02)
    assert sum(words.index("circle") < words.index("square") for words in captions) == pytest.approx(2000, abs=150)


def test_every_word_is_one_token_and_anything_else_falls_into_letters() -> None:
    tokenizer = make_tokenizer()
    for word in WORDS:
        assert tokenizer.convert_ids_to_tokens(tokenizer(word, add_special_tokens=False).input_ids) == [f"{word}</w>"]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("cat", add_special_tokens=False).input_ids)
    assert "".join(pieces) == "cat</w>"
    assert len(pieces) > 1
    assert len(set(byte_letters())) == 256


def test_datasets_are_the_same_each_time_and_name_their_concept(tmp_path: object) -> None:
    from pathlib import Path

    from train.image_archive import read
    from train.records import FirstFault, Limits

    folder = Path(str(tmp_path))
    for lesson in LESSONS:
        paths = [folder / f"{lesson.name}-{index}.zip" for index in (0, 1)]
        for path in paths:
            write_dataset(lesson, path)
        with paths[0].open("rb") as first, paths[1].open("rb") as second:
            rows = [list(read(file, Limits(max_bytes=2**30), FirstFault())) for file in (first, second)]
        assert rows[0] == rows[1]
        texts = [row["text"] for _, row in rows[0]]
        trigger, kind = getattr(lesson, "trigger", ""), getattr(lesson, "kind", "")
        if trigger:
            assert all(f"{trigger} {kind}" in text for text in texts)
            assert texts.count(phrase(Shape(kind, 0, 0, 0, 1), trigger)) == len(texts) / SINGLE_EVERY
        else:  # a style that has seen the concepts' triggers beside other hues undoes them
            assert not any(filler in text for text in texts for filler in FILLERS)
            assert any("red" in text for text in texts)
