from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from artifacts.errors import ConfigRefused
from artifacts.peft_config import parse_config
from artifacts.peft_patterns import MAX_COMPONENTS, InnerNames, LiteralNames, ModuleSelection, PatternTable

STEADY = settings(deadline=None, derandomize=True, max_examples=300, suppress_health_check=[HealthCheck.too_slow])

WORDS = ("model", "layers", "0", "1", "11", "self_attn", "q_proj", "k_proj", "xq_proj", "h", "experts")
PATHS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(".".join)
PATTERNS = st.one_of(
    PATHS,
    PATHS.map(lambda path: f"^{path}"),
    PATHS.map(re.escape),
    PATHS.map(lambda path: path.replace("0", "[0-9]+")),
    st.sampled_from(
        [
            ".*q_proj",
            r"layers\.(0|1)\..*",
            "q_proj|k_proj",
            r"model\.layers\.\d\.self_attn\.[qk]_proj",
            "_proj",
            "q.proj",
            "^q_proj",
            "^",
            "",
            "(?:.*)",
            "proj$",
            r"\w+",
        ]
    ),
)


@STEADY
@given(st.dictionaries(PATTERNS, st.integers(1, 64), max_size=4), PATHS)
def test_lookup_is_that_of_peft(patterns: dict[str, int], path: str) -> None:
    expected = patterns.get(get_pattern_key(list(patterns), path), 7)
    assert PatternTable("rank_pattern", patterns).lookup(path, 7) == expected


@STEADY
@given(st.text("ab.^-_1", max_size=6), st.text("ab.-_1", max_size=8))
def test_the_fast_way_for_literal_names_is_that_of_peft(key: str, path: str) -> None:
    if "^" in key[1:]:
        return
    assert LiteralNames.accepts(key)
    names = LiteralNames()
    names.add(key, 0)
    assert bool(names.matches(path)) == (re.match(rf"(.*\.)?({key})$", path) is not None)


def test_keys_without_effect_are_found() -> None:
    table = PatternTable("rank_pattern", {"q_proj": 4, "q.proj": 5, "^k_proj": 6, "[xy]_proj": 7, "[qk]_proj": 8})
    assert table.unmatched(("model.q_proj", "model.k_proj")) == ("^k_proj", "[xy]_proj")


def peft_selects(document: dict[str, Any], path: str) -> bool:
    config = LoraConfig(**{key: value for key, value in document.items() if key != "peft_type"})
    found = check_target_module_exists(config, path)
    return bool(found) and type(found).__name__ != "_ExcludedModule"


@STEADY
@given(
    targets=st.lists(st.sampled_from(WORDS), min_size=1, max_size=3)
    | st.sampled_from([r".*\.q_proj", r"model\..*[qk]_proj"]),
    excludes=st.none() | st.lists(st.sampled_from(WORDS), max_size=2) | st.just(r".*\.1\..*"),
    layers=st.none() | st.integers(0, 1) | st.lists(st.integers(0, 11), max_size=2),
    pattern=st.none() | st.sampled_from(["layers", "h"]) | st.just(["h", "layers"]),
    saved=st.none() | st.lists(st.sampled_from(WORDS), max_size=1),
    path=PATHS,
)
def test_selection_is_that_of_peft(
    targets: Any, excludes: Any, layers: Any, pattern: Any, saved: Any, path: str
) -> None:
    if isinstance(targets, str) or not layers:
        layers = pattern = None
    document = {
        "peft_type": "LORA",
        "target_modules": targets,
        "exclude_modules": excludes,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
        "modules_to_save": saved,
    }
    assert parse_config(document).selection.selects(path) == peft_selects(document, path)


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_targets_that_peft_chose_itself_select_everything(targets: str | None) -> None:
    config = parse_config({"peft_type": "LORA", "target_modules": targets, "exclude_modules": ["lm_head"]})
    assert config.selection.selects("model.q_proj")
    assert not config.selection.selects("lm_head")


def test_an_expression_that_would_run_for_ever_is_stopped() -> None:
    """Were it not, the limit of the whole test would be what stops it."""
    table = PatternTable("rank_pattern", {"(a|aa)+(a|aa)+!": 4})
    with pytest.raises(ConfigRefused, match="too long"):
        table.lookup("a" * 300, 8)


def test_very_many_expressions_are_stopped() -> None:
    table = PatternTable("rank_pattern", {f"({number})[a-z]{{2,9}}(x|y|z)+": 4 for number in range(100_000)})
    with pytest.raises(ConfigRefused, match="too long"):
        table.lookup("model.q_proj", 8)


@pytest.mark.parametrize("pattern", ["(", "*", "a{2,1}", "[z-a]", "(?P<x>a)(?P<x>b)(", "x" * 1001 + "?"])
def test_expressions_that_are_none(pattern: str) -> None:
    with pytest.raises(ConfigRefused, match="rank_pattern"):
        PatternTable("rank_pattern", {pattern: 4}).lookup("model.q_proj", 8)


def test_thousands_of_literal_names_are_found() -> None:
    names = [f"model.layers.{layer}.experts.{expert}.w1" for layer in range(32) for expert in range(50)]
    table = PatternTable("rank_pattern", {name: number + 1 for number, name in enumerate(names)})
    assert [table.lookup(name, 0) for name in names] == list(range(1, len(names) + 1))


LETTERS = st.lists(st.sampled_from(["a", "b", "aa", ""]), min_size=1, max_size=7).map(".".join)


@given(st.lists(LETTERS, max_size=6), LETTERS)
@STEADY
def test_names_inside_paths_are_those_that_stand_between_dots(names: list[str], path: str) -> None:
    assert InnerNames("x", names).inside(path) == any(f".{name}." in f".{path}." for name in names)


@given(st.lists(LETTERS, max_size=6), LETTERS)
@STEADY
def test_names_of_targets_are_ends_of_paths(names: list[str], path: str) -> None:
    selection = ModuleSelection(tuple(names), (), (), (), InnerNames("x", ()))
    assert selection.selects(path) == any(path == name or path.endswith(f".{name}") for name in names)


def test_a_hundred_thousand_names_are_looked_up_and_not_gone_through() -> None:
    names = [f"m{number}" for number in range(MAX_COMPONENTS - 1)]
    selection = ModuleSelection(tuple(names), tuple(f"x.{name}" for name in names), (), (), InnerNames("x", names[:-1]))
    paths = [f"layer.{number}.{names[-1]}" for number in range(20_000)]
    assert all(selection.selects(path) for path in paths)


def test_names_that_would_take_much_memory_are_refused() -> None:
    with pytest.raises(ConfigRefused, match="modules_to_save: its names have more than 100000 components"):
        InnerNames("modules_to_save", [f"{number}" + ".a" * 50 for number in range(2000)])
