"""A transfer between two real families, SmolLM2-135M and Gemma 3 270M: who learns from whom, and what each arm knows.

All arms are made once, in one folder (`examples.cross_family`). About 17 CPU minutes, and one more for the conversion
of Gemma on the first run of a machine. Five seeds teach this easy task as well as invented inputs do; what these add is
seen with two seeds, which do not tell the rule (docs/explanation/transfer.md has the figures).
"""

from __future__ import annotations

from typing import Any

import pytest

from examples.cross_family.measure import ARMS, Results, measure
from examples.cross_family.orders import CODES, WORDINGS, Order, make_messages, parse, seeds
from examples.cross_family.pair import Pair

MINUTES = 60


@pytest.fixture(scope="module")
def arms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The table, by arm."""
    from examples.gemma3.base_model import base_model_directory as gemma
    from examples.smollm2.base_model import base_model_directory as smollm2

    results = Results()
    pair = Pair(tmp_path_factory.mktemp("pair"), smollm2(), gemma())
    measure(pair, [arm for arm in ARMS if arm not in ("unfiltered", "seeds-only")], results)
    return {row["arm"]: row for row in results.rows}


def score(arms: dict[str, dict[str, Any]], name: str) -> float:
    found = arms[name]["exact_match"]
    assert found is not None, arms[name]
    return float(found)


@pytest.mark.slow
@pytest.mark.timeout(90 * MINUTES)
class TestRealPair:
    def test_the_new_adapter_answers_in_its_teachers_code(self, arms: dict[str, dict[str, Any]]) -> None:
        """The strongest of all: with the same inputs and another teacher the answers are that teacher's. Nothing but
        the teacher knows this code, so whoever used the data's labels or copied weights could not have it."""
        swapped = arms["teacher in quantity_first"]
        assert swapped["exact_match"] >= 0.8
        assert swapped["old_code"] == 0

    def test_inputs_of_the_task_teach_it_and_other_text_does_not(self, arms: dict[str, dict[str, Any]]) -> None:
        base, random = score(arms, "target_base"), score(arms, "random text, labelled")
        source, transferred = score(arms, "source"), score(arms, "transferred")
        assert source >= 0.9
        assert base <= random <= 0.1
        assert transferred >= 0.8 * source
        assert transferred >= base + 0.5

    def test_invented_inputs_teach_more_than_their_seeds(self, arms: dict[str, dict[str, Any]]) -> None:
        alone, transferred = score(arms, "two seeds only"), score(arms, "transferred from two seeds")
        assert score(arms, "random text, labelled") + 0.1 <= alone
        assert alone + 0.15 <= transferred
        assert transferred >= score(arms, "target_base") + 0.5

    def test_what_the_filter_keeps_is_nearer_to_real_inputs(self, arms: dict[str, dict[str, Any]]) -> None:
        likeness = arms["transferred"]["report"]["likeness"]
        assert 0 < likeness["mmd2_kept"] < likeness["mmd2_unfiltered"]

    def test_the_discriminator_tells_real_inputs_and_not_by_chance(self, arms: dict[str, dict[str, Any]]) -> None:
        assert arms["discriminator"]["report"]["auc"] >= 0.8
        assert abs(arms["shuffled discriminator"]["report"]["auc"] - 0.5) <= 0.15
        assert 0 < arms["transferred"]["report"]["inputs"]["acceptance"]["rate"] < 1

    def test_moving_weights_across_families_does_nothing(self, arms: dict[str, dict[str, Any]]) -> None:
        base = score(arms, "target_base")
        for name in ("cross-lora", "lora-x"):
            assert score(arms, name) <= base + 0.05
        for name in ("copy", "prolora"):
            assert arms[name]["exact_match"] is None
            assert arms[name]["note"].startswith("refused: ")
            assert "can not be moved" in arms[name]["note"]

    def test_the_report_is_whole(self, arms: dict[str, dict[str, Any]]) -> None:
        report = arms["transferred"]["report"]
        assert report["labels"]["end_rate"] > 0.8
        assert report["labels"]["distinct"] > 10
        assert report["training"]["reload"]["largest_difference"] <= report["training"]["reload"]["tolerance"]
        assert report["gate"]["verdict"] in ("pass", "hold")


def test_messages_say_their_facts_and_no_fact_is_on_both_sides() -> None:
    train, held_out = make_messages("train", 60), make_messages("held_out", 20)
    for message in (*train, *held_out):
        assert parse(message.text) == message.order
    assert not {message.order.key for message in train} & {message.order.key for message in held_out}
    assert make_messages("train", 60) == train
    assert len(seeds()) == len(set(seeds())) == 5
    assert {message.text for message in held_out}.isdisjoint(seeds())
    assert parse("Send 4 mugs to Lima.") is None


def test_a_code_is_the_same_facts_in_another_order() -> None:
    odd = Order("Anna", "mugs", "blue", "Lima", 5)
    assert odd.message(WORDINGS[0]) == "Please ship 5 blue mugs to Anna in Lima."
    assert CODES["city_first"](odd) == " Lima | mugs | blue | 5"
    assert CODES["quantity_first"](odd) == " 5 | blue | mugs | Lima"
    assert CODES["hard"](odd) == " 10 | blue | mug | LIM"
    assert CODES["hard"](Order("Anna", "mugs", "blue", "Lima", 4)) == " LIM | mug | blue | 8"
