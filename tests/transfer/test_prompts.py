"""Prompts, seeds, screening, keys and the synthetic set: all that needs no model."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
from pydantic import ValidationError

from artifacts.errors import FileBroken, RequestInvalid
from transfer.candidates import Candidate, candidate_key, clean, first_accepted, is_malformed, screen
from transfer.identity import TransferIdentity, base_identity
from transfer.prompts import PromptFormat, discriminator_prompt, generator_prompt, stop_of, stop_text
from transfer.seeds import grown_seeds, parse_seeds, seeds_digest
from transfer.synthetic import SyntheticRow, SyntheticSet, held_out

SEEDS = ("not True", "True and False", "not not False", "True or True", "False or not True")


def identity(**changes: object) -> TransferIdentity:
    known: dict[str, object] = {
        "adapter": "a",
        "source_base": "s",
        "target_base": "t",
        "seeds": seeds_digest(SEEDS),
        "discriminator": None,
        "task": "boolean expressions",
        "format": {"template": "{x}"},
        "method": "trans-lora",
        "parameters": {"rows": 250, "threshold": 0.0},
        "seed": 0,
    }
    return TransferIdentity(**{**known, **changes})  # type: ignore[arg-type]


def test_grown_seeds_are_drawn_for_each_batch_from_all_that_there_are() -> None:
    accepted = [f"True and not {number}" for number in range(20)]
    drawn = [grown_seeds(SEEDS, accepted, "key", batch) for batch in range(30)]
    assert drawn == [grown_seeds(SEEDS, accepted[::-1], "key", batch) for batch in range(30)]
    assert all(len(set(seeds)) == len(SEEDS) for seeds in drawn)
    assert {text for seeds in drawn for text in seeds} == {*SEEDS, *accepted}
    assert len(set(drawn)) == 30
    assert grown_seeds(SEEDS, accepted, "another key", 0) != drawn[0]
    assert set(grown_seeds(SEEDS, [], "key", 0)) == set(SEEDS)


def test_the_generator_gets_a_list_that_it_goes_on_with() -> None:
    assert generator_prompt(SEEDS) == (
        "Here are 10 examples:\n1. not True\n2. True and False\n3. not not False\n4. True or True\n"
        "5. False or not True\n6."
    )
    fifteen = [f"seed {number}" for number in range(15)]
    assert generator_prompt(fifteen).startswith("Here are 30 examples:\n")
    assert generator_prompt(fifteen).endswith("\n16.")


def test_an_input_ends_with_its_line_or_before_the_next_item() -> None:
    assert stop_text(stop_of(SEEDS), len(SEEDS)) == "\n"
    several = (*SEEDS[:4], "two\nlines")
    assert stop_text(stop_of(several), len(several)) == "\n7."


def test_the_discriminator_is_asked_as_the_paper_asks() -> None:
    assert discriminator_prompt("not True", "boolean expressions") == (
        "Answer in as few words as possible. not True\nIs the above question from the boolean expressions dataset?"
    )


def test_a_format_fills_one_place_and_leaves_braces_alone() -> None:
    form = PromptFormat(template="Message: {x}\nCode:")
    assert form.fill("a {x} b {y}") == "Message: a {x} b {y}\nCode:"
    assert form.row("hi", " H") == {"prompt": "Message: hi\nCode:", "completion": " H"}
    chat = PromptFormat(chat=True, system="Be short.")
    assert chat.row("hi", "H") == {
        "messages": [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "H"},
        ]
    }


@pytest.mark.parametrize("fields", [{"template": "no place"}, {"template": "{x}{x}"}, {"system": "without chat"}])
def test_a_format_that_means_nothing_is_refused(fields: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        PromptFormat(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seeds", "pointer", "message"),
    [
        (["secret one", "secret two"], "/seeds", "at least 3"),
        ([f"secret {number}" for number in range(51)], "/seeds", "at most 50"),
        (["secret a", "b", " Secret  A"], "/seeds/2", "equals seed 0"),
        (["secret a", "b", " \n"], "/seeds/2", "is empty"),
        (["secret a", "b", "c" * 8001], "/seeds/2", "more than 8000"),
    ],
)
def test_seeds_are_checked_and_never_told(seeds: list[str], pointer: str, message: str) -> None:
    with pytest.raises(RequestInvalid) as refused:
        parse_seeds(seeds)
    (finding,) = refused.value.errors
    assert finding.pointer == pointer
    assert message in finding.message
    told = f"{refused.value.detail} {refused.value.hint} {finding.message}".lower()
    assert "secret" not in told


def test_seeds_come_back_stripped() -> None:
    assert parse_seeds([" a", "b ", "c\n"]) == ("a", "b", "c")
    assert seeds_digest(["a", "b"]) != seeds_digest(["b", "a"])


def test_screening_names_what_is_wrong() -> None:
    texts: list[tuple[str, str]] = [
        ("  True and True ", "passed"),
        ("NOT  true", "seed"),
        ("true AND true", "duplicate"),
        ("...", "malformed"),
        ("broken \ufffd text", "malformed"),
        ("", "malformed"),
        ("another", "passed"),
    ]
    candidates = [Candidate(number, text, "stop") for number, (text, _) in enumerate(texts)]
    candidates.append(Candidate(len(texts), "cut of", "length"))
    found = screen(candidates, SEEDS)
    assert [item.verdict for item in found] == [verdict for _, verdict in texts] + ["truncated"]
    assert found[0].text == "True and True"


def test_screening_does_not_depend_on_the_order_of_arrival() -> None:
    draws = random.Random(0)
    candidates = [Candidate(number, f"text {draws.randrange(30)}", "stop") for number in range(100)]
    wanted = screen(candidates, SEEDS)
    accepted = {number for number in range(100) if number % 3}
    kept = first_accepted(wanted, accepted, 12)
    for _ in range(20):
        draws.shuffle(candidates)
        assert screen(candidates, SEEDS) == wanted
        shuffled = list(wanted)
        draws.shuffle(shuffled)
        assert first_accepted(shuffled, accepted, 12) == kept
    assert [item.index for item in kept] == sorted(item.index for item in kept)
    assert len(kept) == 12


@pytest.mark.parametrize("indices", [[0, 2], [0, 0, 1], [1]])
def test_a_gap_in_the_candidates_is_no_order(indices: list[int]) -> None:
    with pytest.raises(ValueError, match="without gaps"):
        screen([Candidate(index, "a", "stop") for index in indices], SEEDS)


def test_cleaning_keeps_the_lines() -> None:
    assert clean(" a  \r\n b \n") == "a\n b"
    assert clean("e\u0301") == "\u00e9"
    assert not is_malformed("a\tb\nc")


def test_every_candidate_has_random_numbers_of_its_own() -> None:
    keys = {candidate_key(job, index) for job in ("a", "b") for index in range(500)}
    assert len(keys) == 1000
    assert candidate_key("a", 3) == candidate_key("a", 3) < 2**128


def test_the_job_key_is_of_contents_and_parameters() -> None:
    key = identity().key
    assert identity(parameters={"threshold": 0.0, "rows": 250}).key == key
    changed = [
        identity(adapter="b"),
        identity(source_base="x"),
        identity(target_base=base_identity("t", "tokenizer")),
        identity(discriminator="d"),
        identity(seeds=seeds_digest(SEEDS[1:])),
        identity(task="other"),
        identity(format={"template": "Q: {x}"}),
        identity(method="refresh"),
        identity(parameters={"rows": 251, "threshold": 0.0}),
        identity(seed=1),
        identity(inputs="i"),
    ]
    assert len({key, *(other.key for other in changed)}) == 1 + len(changed)
    assert base_identity("a", "b") != base_identity("b", "a")


def test_the_synthetic_set_is_text_and_comes_back() -> None:
    made = SyntheticSet((SyntheticRow(2, 'a "quoted"\nline', " Zürich"), SyntheticRow(5, "b", " Zürich ")))
    assert SyntheticSet.from_bytes(made.to_bytes()) == made
    assert made.distinct_answers == 1
    assert SyntheticSet.from_bytes(made.to_bytes()).digest == made.digest
    assert b'"prompt": "Q: b"' in made.training_rows(PromptFormat(template="Q: {x}"))
    with pytest.raises(FileBroken):
        SyntheticSet.from_bytes(b'{"i": 1}\n')


def test_the_last_rows_are_held_out() -> None:
    rows = [SyntheticRow(index, str(index), "y") for index in (4, 1, 3)]
    train, measured = held_out(rows, 1)
    assert [row.index for row in train] == [1, 3]
    assert [row.index for row in measured] == [4]
    assert held_out(rows, 0)[1] == ()


def test_none_of_it_imports_torch() -> None:
    code = (
        "import sys, transfer.prompts, transfer.seeds, transfer.candidates, transfer.identity, transfer.synthetic; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
