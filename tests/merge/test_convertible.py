"""What of the base model a conversion needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import pytest

from artifacts.errors import MergeRefused
from merge.convertible import CONVERTIBLE, MAX_FORM_RANK, check_form, need_of


@dataclass
class Module:
    """As far as the need depends on it."""

    type: str = "lora"
    magnitude_key: str | None = None


def need(method: str, modules: list[Module], typed: list[Module]) -> Any:
    return need_of(method, cast("Any", modules), cast("Any", typed))


@pytest.mark.parametrize("method", ["lycoris", "loha", "lokr", "full"])
def test_one_module_that_needs_the_weights_is_enough(method: str) -> None:
    pair, factored = Module(), Module("loha")
    assert need(method, [pair], [factored, Module("full")]) == "nothing"
    assert need(method, [pair, Module(magnitude_key="m")], [factored]) == "weights"
    for kind in ("oft", "boft", "ia3", "glora", "loha-dora", "full-dora"):
        assert need(method, [pair], [factored, Module(kind)]) == "weights"
    assert need(method, [], [Module("a type of tomorrow")]) == "nothing"


def test_others_need_what_their_type_does() -> None:
    assert need("vera", [Module(magnitude_key="m")], []) == "sides"
    assert need("dora", [], []) == "weights"
    assert need("lora", [Module()], []) is None
    assert set(CONVERTIBLE.values()) == {"nothing", "sides", "weights"}


def test_forms_have_a_largest_rank() -> None:
    check_form("a.b", MAX_FORM_RANK)
    with pytest.raises(MergeRefused) as caught:
        check_form("a.b", MAX_FORM_RANK + 1)
    assert caught.value.detail == "a.b is a LoRA of rank 4097 exactly; forms above 4096 are not converted."
