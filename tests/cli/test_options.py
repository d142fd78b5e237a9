"""The texts of options, taken apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from app.cli.options import parse_settings, parse_weights, stem
from app.cli.yaml_file import read_mapping


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/b/adapter.zip", "adapter"),
        ("adapter.tar.gz", "adapter"),
        ("adapter.v2", "adapter.v2"),
        ("adapter.v2.safetensors", "adapter.v2"),
        ("folder/", "folder"),
        (".zip", ".zip"),
    ],
)
def test_stem(path: str, name: str) -> None:
    assert stem(Path(path)) == name


def test_the_stem_of_here_is_the_folders_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert stem(Path()) == tmp_path.name


def test_settings_are_json_where_they_can_be() -> None:
    texts = ["n=3", "x=1e-3", "flag=false", "none=null", "word=2r", "text=a=b", 'list=[1, "two"]', "empty="]
    assert parse_settings(texts) == {
        "n": 3,
        "x": 1e-3,
        "flag": False,
        "none": None,
        "word": "2r",
        "text": "a=b",
        "list": [1, "two"],
        "empty": "",
    }


def test_settings_are_numbers_where_json_wants_a_digit_more() -> None:
    texts = ["a=.5", "b=-.5e-1", "c=5.", "d=.", "e=1.2.3", "f=.5x"]
    found = parse_settings(texts)
    assert found == {"a": 0.5, "b": -0.05, "c": 5.0, "d": ".", "e": "1.2.3", "f": ".5x"}


def test_weights_may_name_a_path_with_an_equals_sign() -> None:
    assert parse_weights(["run=1/adapter=0.5", "b=-2"]) == {"run=1/adapter": 0.5, "b": -2.0}


def test_numbers_with_an_exponent_are_numbers_in_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text('a: 1e-4\nb: -.5E3\nc: 2.e+1\nd: 1.5e-3\ne: "1e-4"\nf: 1e\ng: e5\nh: 1e4x\ni: 7\n')
    found = read_mapping(path, "how-to/train.md")
    assert found == {
        "a": 1e-4, "b": -500.0, "c": 20.0, "d": 1.5e-3, "e": "1e-4", "f": "1e", "g": "e5", "h": "1e4x", "i": 7,
    }  # fmt: skip
    assert isinstance(found["i"], int)
