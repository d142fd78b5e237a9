"""Switching again and again is switching once, whoever switched in between."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_state import state_of

from compose.adapter_switch import AdapterSwitch, activate, activate_layers, rest, restored, tuner_layers
from compose.engine import compose
from compose.pipelines import LoadedPipeline
from compose.request import Style

ACTING = [{}, {"a": 1.0}, {"b": 0.5}, {"a": 1.0, "b": 0.5}, {"b": 0.5, "a": 1.0}, {"a": 2.0}]


@pytest.fixture(scope="module")
def loaded(sd: Any, pipelines: Any) -> LoadedPipeline:
    found: LoadedPipeline = pipelines.get(sd.base)
    compose(sd.request(method="merge", steps=1, styles=(Style(sd.text, "style"),)), pipelines)
    return found


def named(loaded: LoadedPipeline, weights: dict[str, float]) -> dict[str, float]:
    """By the names of the first two adapters within the pipeline."""
    names = dict(zip("ab", loaded.names.values(), strict=False))
    return {names[name]: weight for name, weight in weights.items()}


@settings(max_examples=8, deadline=None)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(ACTING), st.sampled_from(["nobody", "one layer", "all layers", "rest"])),
        min_size=2,
        max_size=6,
    )
)
def test_a_switch_sets_what_a_fresh_one_does(loaded: LoadedPipeline, turns: list[tuple[dict[str, float], str]]) -> None:
    layers = tuner_layers(loaded.unet)
    with loaded.lock, loaded.restored():
        switch = AdapterSwitch(layers)
        for weights, between in turns:
            wanted = named(loaded, weights)
            switch.activate(wanted)
            found = [(list(layer.active_adapters), layer.disable_adapters, dict(layer.scaling)) for layer in layers]
            activate_layers(layers, wanted)
            for (active, disabled, scaling), layer in zip(found, layers, strict=True):
                assert disabled is layer.disable_adapters
                assert disabled or active == layer.active_adapters
                assert all(scaling[name] == layer.scaling[name] for name in wanted if name in scaling)
            assert not any(parameter.requires_grad for parameter in loaded.unet.parameters())
            if between == "one layer":
                activate(layers[3], named(loaded, {"a": 3.0}))
            elif between == "all layers":
                activate_layers(layers, named(loaded, {"b": 3.0}))
            elif between == "rest":
                rest(loaded.unet)


def test_two_switches_of_one_model_do_not_trust_each_other(loaded: LoadedPipeline) -> None:
    layers = tuner_layers(loaded.unet)
    with loaded.lock, loaded.restored():
        one, other = AdapterSwitch(layers), AdapterSwitch(layers)
        first, second = named(loaded, {"a": 1.0}), named(loaded, {"b": 0.25})
        for _ in range(2):
            one.activate(first)
            other.activate(second)
        one.activate(first)
        assert all(layer.active_adapters == list(first) and not layer.disable_adapters for layer in layers)


def test_everything_that_can_be_changed_inside_is_put_back(loaded: LoadedPipeline) -> None:
    before = state_of(loaded)
    with restored(*loaded.models):
        activate(loaded.unet, named(loaded, {"a": 0.25, "b": 3.0}))
        loaded.unet.train().requires_grad_(True).enable_gradient_checkpointing()
        next(loaded.unet.parameters()).grad = next(loaded.unet.parameters()).detach().clone()
        assert state_of(loaded) != before
    assert state_of(loaded) == before
