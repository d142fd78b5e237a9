"""A search of merges: its space, what it tries next, what it shares between trials, and its picture."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from artifacts.errors import FieldError, RequestInvalid
from merge.catalog import parse_parameters
from merge.comparison import Candidate, StackShelf, compare_files
from merge.engine import merge_files
from merge.pictures import pictures_of_merge
from merge.search import Trial, best_of, is_exhausted, propose, same_merge
from merge.search_options import SearchOptions
from merge.search_space import Dimension, SearchSpace
from merge.stack import Stack

BODY: dict[str, Any] = {
    "methods": [
        {"method": "svd"},
        {
            "method": "core_space",
            "parameters": {"density": {"low": 0.1, "high": 0.9, "log": True}, "rule": {"choices": ["tsv", "ties"]}},
        },
        {"method": "lego", "parameters": {"seed": 1, "n_init": {"low": 1, "high": 9}}, "label": "clusters"},
    ],
    "weights": [{"low": 0.25, "high": 2.0}, None],
    "ranks": [4, "2r"],
}


def space_of(body: dict[str, Any] = BODY, weights: tuple[float, ...] = (1.0, -0.5)) -> SearchSpace:
    return SearchSpace.of(SearchOptions.model_validate(body), weights)


def loss_of(proposal: Any) -> float:
    """A landscape whose best method, weight and rule are known."""
    away = {"svd": 0.5, "core_space": 0.0, "clusters": 0.2}[proposal.label]
    return away + (proposal.weights[0] - 1.3) ** 2 + (proposal.parameters.get("rule") == "ties")


def searched(space: SearchSpace, count: int, begun: list[Trial] | None = None, **options: Any) -> list[Trial]:
    trials = list(begun or [])
    for number in range(len(trials), count):
        point = propose(space, trials, **{"sampler": "tpe", "startup": 5, "seed": 3, **options})
        proposal = space.proposal(point)
        # every seventh one fails, as a merge that can not be done
        found = {"state": "failed"} if number % 7 == 5 else {"state": "measured", "value": loss_of(proposal), "rank": 4}
        trials.append(Trial.at(number, point, proposal, **found))
    return trials


def test_the_first_trials_are_the_methods_as_they_were_asked_for() -> None:
    space = space_of()
    first = [space.proposal(space.plain(position)) for position in range(3)]
    assert [item.label for item in first] == ["svd", "core_space", "clusters"]
    assert {item.weights for item in first} == {(1.0, -0.5)}
    assert [dict(item.parameters) for item in first] == [
        {"rank": 4},
        {"density": 0.2, "rule": "tsv", "rank": 4},
        {"seed": 1, "n_init": 9, "rank": 4},
    ]
    outside = space_of({**BODY, "weights": [{"low": 2.0, "high": 3.0}]})
    assert outside.proposal(outside.plain(0)).weights == (2.0, 2.0)
    assert all(item.options for item in first)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(3, 8), sampler=st.sampled_from(["tpe", "random"]))
def test_whatever_is_tried_lies_in_the_space(seed: int, count: int, sampler: str) -> None:
    space = space_of()
    trial = searched(space, count, seed=seed, sampler=sampler)[-1]
    assert 0.25 <= trial.weights[0] <= 2.0
    assert trial.weights[1] == -0.5
    assert trial.parameters["rank"] in (4, "2r")
    if trial.label == "core_space":
        assert 0.1 <= trial.parameters["density"] <= 0.9
        assert trial.parameters["rule"] in ("tsv", "ties")
    if trial.label == "clusters":
        assert trial.parameters["n_init"] in range(1, 10)
        assert trial.parameters["seed"] == 1
    assert parse_parameters(trial.method, trial.parameters)


@pytest.mark.parametrize(("cut", "sampler"), [(1, "tpe"), (4, "tpe"), (13, "tpe"), (7, "random")])
def test_a_search_goes_on_from_its_trials_as_if_it_had_not_been_interrupted(cut: int, sampler: str) -> None:
    space = space_of()
    whole = searched(space, 16, sampler=sampler)
    kept = [Trial(**json.loads(json.dumps(trial.to_dict()))) for trial in whole[:cut]]
    again = searched(space, 16, kept, sampler=sampler)
    assert [trial.to_dict() for trial in again] == [trial.to_dict() for trial in whole]
    other = searched(space, 16, seed=4, sampler=sampler)
    assert [trial.merge for trial in other[3:]] != [trial.merge for trial in whole[3:]]


def test_the_estimator_finds_what_chance_does_not() -> None:
    space = space_of()

    def best(sampler: str) -> float:
        values = [best_of(searched(space, 30, seed=seed, sampler=sampler))[0].value or 0.0 for seed in range(3)]
        return math.fsum(values) / 3

    assert best("tpe") < best("random")


def test_a_small_space_is_searched_to_its_end_and_no_further() -> None:
    body = {"methods": [{"method": "svd"}, {"method": "cat"}], "ranks": [1, 2, 3, 4]}
    space = space_of(body)
    assert space.size == 5  # cat takes no rank
    trials: list[Trial] = []
    while not is_exhausted(space, trials):
        point = propose(space, trials, sampler="tpe", startup=2, seed=0)
        wanted = Trial.at(len(trials), point, space.proposal(point), state="measured", value=1.0, rank=1)
        trials.append(replace(wanted, state="repeated") if same_merge(trials, wanted) else wanted)
        assert len(trials) < 12
    assert len(best_of(trials)) == 5
    assert space_of().size == math.inf


def test_of_equal_trials_the_smaller_rank_is_the_better_then_the_earlier() -> None:
    space = space_of()
    known = [(1.0, 8), (1.0, 4), (1.0, 4), (2.0, 1)]
    trials = [
        Trial.at(number, space.plain(0), space.proposal(space.plain(0)), state="measured", value=value, rank=rank)
        for number, (value, rank) in enumerate(known)
    ]
    assert [trial.number for trial in best_of(trials)] == [1, 2, 0, 3]
    assert best_of([replace(trials[0], state="failed", value=None)]) == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown method": ({"methods": [{"method": "cat"}, {"method": "magic"}]}, "/parameters/methods/1/method"),
    "unknown parameter": (
        {"methods": [{"method": "svd", "parameters": {"colour": 1}}]},
        "/parameters/methods/0/parameters/colour",
    ),
    "range of an unknown parameter": (
        {"methods": [{"method": "svd", "parameters": {"colour": {"low": 0, "high": 1}}}]},
        "/parameters/methods/0/parameters/colour",
    ),
    "fixed value out of range": (
        {"methods": [{"method": "lego", "parameters": {"n_init": 0}}]},
        "/parameters/methods/0/parameters/n_init",
    ),
    "end of a range out of range": (
        {"methods": [{"method": "sce", "parameters": {"density": {"low": 0.1, "high": 1.5}}}]},
        "/parameters/methods/0/parameters/density",
    ),
    "low above high": (
        {"methods": [{"method": "sce", "parameters": {"density": {"low": 0.5, "high": 0.1}}}]},
        "/parameters/methods/0/parameters/density",
    ),
    "logarithm of zero": (
        {"methods": [{"method": "sce", "parameters": {"density": {"low": 0, "high": 1, "log": True}}}]},
        "/parameters/methods/0/parameters/density",
    ),
    "fraction of a whole number": (
        {"methods": [{"method": "lego", "parameters": {"n_init": {"low": 1.5, "high": 3}}}]},
        "/parameters/methods/0/parameters/n_init",
    ),
    "range of words": (
        {"methods": [{"method": "core_space", "parameters": {"rule": {"low": 1, "high": 3}}}]},
        "/parameters/methods/0/parameters/rule",
    ),
    "unknown choice": (
        {"methods": [{"method": "core_space", "parameters": {"rule": {"choices": ["sum", "best"]}}}]},
        "/parameters/methods/0/parameters/rule",
    ),
    "no choices": (
        {"methods": [{"method": "core_space", "parameters": {"rule": {"choices": []}}}]},
        "/parameters/methods/0/parameters/rule",
    ),
    "values that do not go together": (
        {"methods": [{"method": "della", "parameters": {"density": 0.95}}]},
        "/parameters/methods/0/parameters",
    ),
    "a rank that one method does not take": (
        {"methods": [{"method": "svd"}], "ranks": [4, "exact"]},
        "/parameters/ranks/1",
    ),
    "a parameter under both its names": (
        {"methods": [{"method": "lego", "parameters": {"k": {"low": 1, "high": 4}, "rank": 3}}]},
        "/parameters/methods/0/parameters/rank",
    ),
    "an end out of range, under the other name": (
        {"methods": [{"method": "lego", "parameters": {"k": {"low": 0, "high": 4}}}]},
        "/parameters/methods/0/parameters/k",
    ),
    "a range turned round, under the other name": (
        {"methods": [{"method": "lego", "parameters": {"k": {"low": 4, "high": 1}}}]},
        "/parameters/methods/0/parameters/k",
    ),
    "three ranges for two adapters": ({"weights": [None, None, {"low": 0, "high": 1}]}, "/parameters/weights"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_searched_is_refused_where_it_stands(name: str) -> None:
    body, pointer = REFUSED[name]
    with pytest.raises(RequestInvalid) as caught:
        space_of(body)
    assert [item.pointer for item in caught.value.errors] == [pointer]


SAID: dict[str, tuple[dict[str, Any], str]] = {
    "parameter": (REFUSED["range of an unknown parameter"][0], "colour: method 'svd' has no parameter 'colour'."),
    "order": (REFUSED["low above high"][0], "density: low must be below high."),
    "part": (REFUSED["fraction of a whole number"][0], "n_init: is a whole number: low and high must be too."),
    "words": (REFUSED["range of words"][0], "rule: is no number: name the choices, as {choices: […]}."),
    "nothing": (REFUSED["no choices"][0], "rule: choices is a list of 1 to 64 values, and stands alone."),
    "twice": (REFUSED["a parameter under both its names"][0], "rank: rank is given twice."),
    "three": (
        REFUSED["three ranges for two adapters"][0],
        "weights: one range for all adapters, or one for each of the 2; not 3.",
    ),
    "half a range": (
        {"methods": [{"method": "sce", "parameters": {"density": {"low": 0.5}}}]},
        "density: high: Field required.",
    ),
    "a word for a number": (
        {"methods": [{"method": "sce", "parameters": {"density": {"low": "a", "high": 1.0}}}]},
        "density: low: Input should be a valid number.",
    ),
    "choices and more": (
        {"methods": [{"method": "sce", "parameters": {"density": {"choices": [0.5], "log": True}}}]},
        "density: choices is a list of 1 to 64 values, and stands alone.",
    ),
    "choices that are no list": (
        {"methods": [{"method": "sce", "parameters": {"density": {"choices": "0.5"}}}]},
        "density: choices is a list of 1 to 64 values, and stands alone.",
    ),
    "65 choices": (
        {"methods": [{"method": "lego", "parameters": {"seed": {"choices": list(range(65))}}}]},
        "seed: choices is a list of 1 to 64 values, and stands alone.",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_the_sentence_names_the_parameter_and_what_is_wrong(name: str) -> None:
    body, sentence = SAID[name]
    with pytest.raises(RequestInvalid) as caught:
        space_of(body)
    assert caught.value.detail == sentence
    (finding,) = caught.value.errors
    assert sentence.endswith(f": {finding.message}.")


def test_dimensions_are_called_after_their_method() -> None:
    own = {"density": {"choices": [0.5]}, "rule": {"choices": ["tsv", "ties"]}}
    space = space_of({"methods": [{"method": "core_space", "parameters": own, "label": "mine"}], "ranks": [4]})
    assert space.active(0) == [
        Dimension("mine.density", choices=(0.5,)),
        Dimension("mine.rule", choices=("tsv", "ties")),
        Dimension("mine.rank", choices=(4,)),
    ]
    assert (space.size, space.labels, space.requested) == (2, ("mine",), (1.0, -0.5))
    assert space_of().dimensions[2] == {
        "n_init": Dimension("clusters.n_init", 1, 9, whole=True),
        "rank": Dimension("clusters.rank", choices=(4, "2r")),
    }
    assert space_of().dimensions[1]["density"] == Dimension("core_space.density", 0.1, 0.9, log=True)


def test_a_trial_remembers_its_proposal() -> None:
    space = space_of()
    proposal = space.proposal(space.plain(2))
    trial = Trial.at(7, space.plain(2), proposal, state="measured", value=1.5, rank=4)
    assert (trial.number, trial.label, trial.method) == (7, "clusters", "lego")
    assert (trial.parameters, tuple(trial.weights)) == (proposal.parameters, proposal.weights)
    assert (trial.point, trial.state, trial.value, trial.rank) == (space.plain(2), "measured", 1.5, 4)


def test_as_many_choices_as_there_may_be() -> None:
    space = space_of({"methods": [{"method": "lego", "parameters": {"seed": {"choices": list(range(64))}}}]})
    assert space.size == 64


LOCATED: dict[str, tuple[int, str, str]] = {
    "a method's own parameter": (1, "/parameters/density", "/parameters/methods/1/parameters/density"),
    "all parameters": (1, "/parameters", "/parameters/methods/1/parameters"),
    "a name that begins alike": (1, "/parameters_of", "/parameters_of"),
    "the shared ranks": (0, "/parameters/rank", "/parameters/ranks"),
    "a rank of its own": (2, "/parameters/rank", "/parameters/methods/2/parameters/k"),
    "a range of weights": (0, "/adapters/0/weight", "/parameters/weights"),
    "a weight of the request": (0, "/adapters/1/weight", "/adapters/1/weight"),
    "what only ends so": (0, "/more/adapters/0/weight", "/more/adapters/0/weight"),
    "what goes on": (0, "/adapters/0/weight/low", "/adapters/0/weight/low"),
    "an adapter": (0, "/adapters/0/id", "/adapters/0/id"),
}


@pytest.mark.parametrize("name", LOCATED)
def test_what_is_wrong_with_a_merge_is_told_where_the_search_was_asked_for_it(name: str) -> None:
    method, pointer, expected = LOCATED[name]
    own = {"method": "lego", "parameters": {"k": {"low": 2, "high": 6}}}
    space = space_of({**BODY, "methods": [*BODY["methods"][:2], own]})
    with pytest.raises(RequestInvalid) as caught, space.located(method):
        raise RequestInvalid("wrong", errors=[FieldError(pointer, "why")])
    assert caught.value.errors == (FieldError(expected, "why"),)


def test_the_merge_that_fails_if_any_does_has_the_largest_rank_and_the_least_weights() -> None:
    rank = {"choices": ["r", 2, 9, 5]}
    space = space_of(
        {
            "methods": [{"method": "svd", "parameters": {"rank": rank}}, {"method": "tsv_m"}],
            "ranks": [3, 7, "2r"],
            "weights": [{"low": -0.5, "high": 2.0}, {"low": 0.0, "high": 3.0}, {"low": 0.5, "high": 4.0}, None],
        },
        (1.0, 1.0, 1.0, -2.0),
    )
    found = [space.proposal(space.extreme(method)) for method in (0, 1)]
    assert [item.parameters["rank"] for item in found] == [9, 7]
    assert {item.weights for item in found} == {(-0.5, 3.0, 4.0, -2.0)}
    words = space_of({"methods": [{"method": "svd", "parameters": {"rank": {"choices": ["2r", "r"]}}}]})
    assert words.proposal(words.extreme(0)).parameters == {"rank": "2r"}


def test_one_range_of_weights_is_for_all_adapters() -> None:
    one = space_of({"methods": [{"method": "cat"}], "weights": [{"low": 0.5, "high": 8.0, "log": True}]}, (1.0, 9.0))
    assert one.weights == tuple(Dimension(f"weight {at}", 0.5, 8.0, log=True) for at in (0, 1))
    assert one.plain(0) == {"method": 0, "weight 0": 1.0, "weight 1": 8.0}
    assert [item.name for item in one.active(0)] == ["weight 0", "weight 1"]
    assert one.size == math.inf


def test_a_range_of_ranks_may_have_its_other_name_and_is_planned_at_its_end() -> None:
    space = space_of({"methods": [{"method": "lego", "parameters": {"k": {"low": 2, "high": 6}}}], "ranks": [16]})
    assert space.size == 5
    assert space.proposal(space.extreme(0)).parameters == {"rank": 6}
    assert space.proposal(space.plain(0)).parameters == {"rank": 4}
    assert parse_parameters("lego", space.proposal(space.plain(0)).parameters)


def test_values_that_may_go_together_with_others_are_not_refused() -> None:
    both = {"density": {"choices": [0.5, 0.95]}, "epsilon": {"choices": [0.02, 0.3]}}
    space = space_of({"methods": [{"method": "della", "parameters": both}]})
    assert space.size == 4
    with pytest.raises(RequestInvalid, match="density"):
        assert space.proposal({"method": 0, "della.density": 1, "della.epsilon": 1}).options


def test_the_middle_stands_for_a_default_that_is_no_number() -> None:
    assert Dimension("d", 1, 100, log=True).nearest(None) == pytest.approx(10)
    assert Dimension("d", 1, 4, whole=True).nearest(None) == 2
    assert Dimension("d", 1, 3).nearest(7) == 3


def test_trials_share_what_was_read_and_give_the_bytes_of_the_merge_alone(
    write_adapter: Callable[..., Path],
    as_input: Callable[..., tuple[Any, Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(3)
    shared = torch.randn(2, 12, generator=generator), torch.randn(10, 2, generator=generator)
    pool = [
        as_input(write_adapter(name, {"layers.0.q": shared, f"layers.{place}.q": tuple(map(torch.clone, shared))}), 1.0)
        for place, name in enumerate(("first", "second", "third"), start=1)
    ]
    read: list[str] = []
    load = Stack.load.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, module: Any, *args: Any) -> Stack:
        read.append(module.path)
        return load(cls, module, *args)  # type: ignore[no-any-return]

    monkeypatch.setattr(Stack, "load", classmethod(counted))
    shelf = StackShelf(10**6)
    for number, weights in enumerate([(1.0, 1.0, 1.0), (-0.5, 2.0, 0.25), (3.0, -0.1, 0.2)]):
        weighted = [(replace(item, weight=weight), path) for (item, path), weight in zip(pool, weights, strict=True)]
        for method in ("svd", "tsv_m"):
            options = parse_parameters(method, {"rank": 2})
            place = tmp_path / f"{method}-{number}"
            (one,) = compare_files(weighted, [Candidate(method, method, options)], place, shelf=shelf)
            before = len(read)
            merge_files(weighted, method, options, place / "alone")
            del read[before:]
            name = "adapter_model.safetensors"
            assert (one.directory / name).read_bytes() == (place / "alone" / name).read_bytes()
    assert sorted(read) == [f"layers.{place}.q" for place in range(4)]
    # an adapter of weight 0 takes no part: other stacks, of the modules that it has
    less = [pool[0], pool[1], (replace(pool[2][0], weight=0.0), pool[2][1])]
    compare_files(less, [Candidate("svd", "svd", parse_parameters("svd", {}))], tmp_path / "less", shelf=shelf)
    assert read[4:] == ["layers.0.q"]
    # what the methods computed of a stack is not kept with it
    assert all(set(vars(kept)) <= {*vars(kept.bare())} for kept in shelf._kept.values())
    small = StackShelf(0)
    for turn in range(2):
        compare_files(pool, [Candidate("cat", "cat", parse_parameters("cat", {}))], tmp_path / str(turn), shelf=small)
    assert len(read) == 5 + 2 * 4


def test_the_picture_shows_every_trial_and_the_best_until_then() -> None:
    trials: list[dict[str, Any]] = [
        {"label": "svd <b>", "figures": {"loss": 0.5}},
        {"label": "lego"},
        {"label": "lego", "figures": {"loss": 9.0}},
        {"label": "lego", "figures": {"loss": 0.25}},
    ]
    report = {
        "method": "search",
        "metric": "loss",
        "higher_is_better": False,
        "trials": trials,
        "evaluation": {"base": {"loss": 2.0}},
        "merge": {"method": "lego", "modules": [{"path": "layers.0.q", "relative_error": 0.1}]},
    }
    chart, errors = pictures_of_merge(report)
    assert (chart.name, errors.name) == ("trials", "errors")
    drawn = ElementTree.fromstring(chart.draw())
    circles = [item for item in drawn.iter() if item.tag.endswith("circle") and item.get("r") == "4"]
    assert len(circles) == 3 + 2  # and of the legend
    outside = [item for item in circles if item.get("class") == "outside"]
    assert len(outside) == 1  # worse than the base model
    (line,) = (item for item in drawn.iter() if item.get("class") == "best")
    heights = [float(place.split(",")[1]) for place in (line.get("points") or "").split()]
    assert len(set(heights)) == 2
    assert heights == sorted(heights)
    assert "svd &lt;b&gt;" in chart.draw()
    nothing = {**report, "trials": [{"label": "lego"}], "higher_is_better": True}
    assert re.search(r'class="failed"', pictures_of_merge(nothing)[0].draw())
