"""What an engine will make of a training's adapter, told from the request."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from artifacts.compatibility import Engine
from artifacts.errors import RequestInvalid
from train.catalog import METHODS, find_method, parse_parameters
from train.engine_outlook import check_trained
from train.options.common import Target, TrainOptions
from train.settings import TaskName

LAYERS = (Target("model.layers.0.self_attn.q_proj", 4096, 4096),)


def check(
    engine: Engine, method: str = "lora", task: TaskName = "causal-lm", known: bool = True, **parameters: Any
) -> None:
    options = parse_parameters(method, parameters)
    check_trained(find_method(method), options, task, LAYERS if known else (), engine)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_engines_of_language_models_take_what_ends_as_a_plain_lora(method: str, known: bool) -> None:
    row = METHODS[method]
    options: dict[str, Any] = {}
    plain = row.capabilities.exports == "lora" and "causal-lm" in row.capabilities.tasks
    for engine in ("vllm", "llama.cpp"):
        if plain:
            check(engine, method, known=known, **options)
        else:
            with pytest.raises(RequestInvalid, match=f"{engine} would not load the result"):
                check(engine, method, row.capabilities.tasks[0], known, **options)


def test_what_gives_adapters_beside_its_own_is_made_for_no_engine() -> None:
    """Only the main adapter is written for an engine: one that an engine loads would need the others written too."""
    options = parse_parameters("smora", {"fold": "per_task"})
    assert options.gives_beside
    for engine in get_args(Engine):
        with pytest.raises(RequestInvalid, match="would not load the result"):
            check_trained(find_method("smora"), options, "causal-lm", LAYERS, engine)
    others = [name for name in METHODS if find_method(name).options.gives_beside is not TrainOptions.gives_beside]
    assert others == ["smora"]


@pytest.mark.parametrize(
    ("method", "parameters", "loads"),
    [
        ("lora", {"rank": 512}, True),
        ("lora", {"rank": 513}, False),
        ("pissa", {"rank": 256}, True),
        ("pissa", {"rank": 257}, False),
        ("olora", {"rank": 257}, False),
        ("nlora", {"rank": 257}, True),
        ("nlora", {"rank": 257, "residual": True}, False),
        ("slora", {"rank": 513}, False),
        ("bone", {"rank": 513}, False),
    ],
)
def test_ranks_above_those_that_vllm_serves(method: str, parameters: dict[str, Any], loads: bool) -> None:
    if loads:
        check("vllm", method, **parameters)
        return
    with pytest.raises(RequestInvalid) as caught:
        check("vllm", method, **parameters)
    assert [error.pointer for error in caught.value.errors] == ["/parameters/rank"]
    assert "rule vllm-rank, https://" in caught.value.errors[0].message
    check("llama.cpp", method, **parameters)


def test_what_a_task_trains_whole_is_in_the_way() -> None:
    for engine, rule in (("vllm", "vllm-modules-to-save"), ("llama.cpp", "llama-cpp-tensors")):
        with pytest.raises(RequestInvalid) as caught:
            check(engine, task="sequence-classification")  # type: ignore[arg-type]
        assert [error.pointer for error in caught.value.errors] == ["/task"]
        assert rule in caught.value.errors[0].message
    check("peft", task="sequence-classification")


def test_variants_are_told_apart() -> None:
    for variant in ("default", "mini"):
        check("vllm", "bone", rank=64, variant=variant)
    for parameters in ({"variant": "bat_col"}, {"variant": "bat_row"}):
        with pytest.raises(RequestInvalid, match="applies LoRA"):
            check("vllm", "bone", rank=64, **parameters)
    check("vllm", "bone", rank=64, variant="bat_row", lossy_rank=8)
    with pytest.raises(RequestInvalid, match="makes a model here"):
        check("peft", "lora-bert", "transcript-classification", mode="full")


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("method", "rule"),
    [
        ("dora", "transformers-dora"),
        ("vera", "transformers-shared-state"),
        ("prompt-tuning", "transformers-prompt-learning"),
    ],
)
def test_what_transformers_leaves_out_is_loaded_by_peft(method: str, rule: str, known: bool) -> None:
    check("peft", method, known=known)
    check("transformers", known=known)
    with pytest.raises(RequestInvalid) as caught:
        check("transformers", method, known=known)
    assert [error.pointer for error in caught.value.errors] == ["/method"]
    assert f"rule {rule}, https://" in caught.value.errors[0].message


@pytest.mark.parametrize("engine", ["diffusers", "kohya", "comfy"])
def test_engines_of_image_models(engine: Engine) -> None:
    check(engine, task="text-to-image")
    with pytest.raises(RequestInvalid, match="runs image models; the task is causal-lm"):
        check(engine)
    with pytest.raises(RequestInvalid, match="applies LoRA; dora makes dora"):
        check(engine, "dora", "text-to-image")
    with pytest.raises(RequestInvalid, match="runs language models; the task is text-to-image"):
        check("vllm", task="text-to-image")
    check("peft", task="text-to-image")
