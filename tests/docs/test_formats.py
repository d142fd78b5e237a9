"""The figures of the page on formats: counts are those of the corpus, and nothing in it breaks a promise."""

from __future__ import annotations

import math
from collections import Counter

import torch

from scripts.formats_engines import PEFT_LOADS_NOT, diffusers_candidates, distance, peft_candidates
from scripts.formats_figures import faults, kept_figures
from scripts.formats_report import layouts


def families(names: set[str]) -> Counter[str]:
    return Counter(name.partition("/")[0] for name in names)


def test_the_layouts_that_are_compared_are_those_that_the_page_counts(pages: dict[str, str]) -> None:
    engines = kept_figures()["engines"]
    for engine, names in (
        ("diffusers", set(diffusers_candidates())),
        ("PEFT", peft_candidates().keys() - PEFT_LOADS_NOT),
    ):
        counted = {family: found[engine] for family, found in engines.items() if found[engine]}
        assert counted == families(names), engine
    total = sum(found["diffusers"] for found in engines.values())
    assert f"| **all** | {total} |" in pages["formats.md"]


def test_every_family_is_on_the_page_and_nothing_breaks_a_promise() -> None:
    figures = kept_figures()
    assert figures["identification"].keys() == families(set(layouts())).keys()
    assert set(figures["round_trips"]) == {"peft", "safetensors", "diffusers", "kohya", "comfy", "gguf"}
    assert faults(figures) == []


def test_numbers_that_are_none_are_infinitely_far() -> None:
    one = torch.ones(2, 2)
    assert distance(one * 2, one) == 1.0
    assert distance(one, torch.zeros(2, 2)) == 2.0
    for value in (math.nan, math.inf):
        broken = torch.tensor([[1.0, value]])
        assert distance(broken, torch.ones(1, 2)) == distance(torch.ones(1, 2), broken) == math.inf
