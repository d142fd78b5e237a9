"""Training on from a stored adapter: where it starts, what it refuses, and that it resumes to the bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_methods import digests
from transformers import AutoTokenizer

from artifacts.base_model import BaseModelRef
from artifacts.errors import BaseMismatch, FileBroken, RequestInvalid, ShapeMismatch
from artifacts.intake import inspect
from train import declared
from train.catalog import METHODS, find_method, parse_parameters
from train.continuation import Start, check_base, continued_options, place
from train.engine import linear_layers
from train.protocol import MethodContext
from train.quiet import peft_deprecations_ignored
from train.settings import TrainingSettings
from train.targets import resolve_targets

PROMPT = "3 plus 4 is "
PARAMETERS: dict[str, dict[str, Any]] = {
    "miss": {"rank": 8},
    "vera": {"rank": 32},
    "rslora": {"rank": 4, "alpha": 3.0},
    "smora": {"rank": 6, "active_rank": 2, "alpha": 3.0},
}
PAIRS = [
    ("lora", "lora"),
    ("lora", "rslora"),
    ("rslora", "lora"),
    ("rslora", "rslora"),
    ("lora", "lora-plus"),
    ("rslora", "lora-fa"),
    ("eva", "lora"),
    ("adalora", "rslora"),
    ("rslora", "allora"),
    ("pissa", "lora"),
    ("dora", "dora"),
    ("dora", "gradnormlorp"),
    ("vera", "vera"),
    ("miss", "miss"),
    ("miss", "bone"),
    ("miss mini", "bone"),
    ("miss bat", "bone"),
    ("smora", "smora"),
]
FORMS: dict[str, dict[str, Any]] = {
    "miss mini": {"init_weights": "mini", "mini_r": 4},
    "miss bat": {"init_weights": "bat"},
}


@pytest.fixture(scope="module")
def stored(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A trained adapter of each method, made once."""
    from trainings import Trainings

    trainings = Trainings(tmp_path_factory.mktemp("stored"), tiny_base)
    made: dict[str, Path] = {}

    def adapter(method: str) -> Path:
        if method in FORMS and method not in made:
            made[method] = write_miss(trainings, FORMS[method])
        elif method not in made:
            rate = 0.05 if method == "vera" else 0.01
            parameters = {} if method == "adalora" else PARAMETERS.get(method, {"rank": 4})
            made[method] = trainings.run(method, parameters, steps=3, learning_rate=rate, batch_size=4)[1]
        return made[method]

    return adapter


def write_miss(trainings: Any, form: dict[str, Any]) -> Path:
    """An adapter as PEFT writes it, of rank 8, with blocks that are not 0."""
    directory: Path = trainings.folder / f"peft-{form['init_weights']}"
    with peft_deprecations_ignored():
        model = get_peft_model(trainings.load_base(), MissConfig(r=8, target_modules=["q_proj", "up_proj"], **form))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "miss_block" in name:
                value.copy_(0.1 * torch.randn(value.shape, generator=generator))
    model.save_pretrained(directory, save_embedding_layers=False)
    return directory


def tokenizer_of(trainings: Any) -> Any:
    return AutoTokenizer.from_pretrained(trainings.base)


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**tokenizer(PROMPT, return_tensors="pt")).logits
    return found


def started(trainings: Any, method: str, source: Path, parameters: dict[str, Any] | None = None) -> Any:
    """The model before the first step."""
    base = trainings.load_base()
    manifest = inspect(source)
    options = continued_options(find_method(method), parse_parameters(method, parameters or {}), manifest)
    targets = resolve_targets(linear_layers(base), options.target_modules)
    context = MethodContext(
        targets=[target.path for target in targets],
        total_steps=1,
        batches=lambda: iter(()),
        settings=TrainingSettings(steps=1),
        start=Start("source", manifest, source).placed(targets),
    )
    return find_method(method).load(options).prepare(base, context).eval()


@pytest.mark.parametrize(("source", "method"), PAIRS)
def test_the_first_step_sees_the_stored_adapter(
    trainings: Any, stored: Callable[[str], Path], source: str, method: str
) -> None:
    adapter = stored(source)
    model = started(trainings, method, adapter)
    plain = logits(trainings.load_base(), tokenizer_of(trainings))
    with peft_deprecations_ignored():
        load = declared.load if declared.is_declared(adapter) else PeftModel.from_pretrained
        stock = load(trainings.load_base(), adapter).eval()  # type: ignore[operator]
    expected = logits(stock, tokenizer_of(trainings))
    torch.testing.assert_close(logits(model, tokenizer_of(trainings)), expected, rtol=0, atol=1e-5)
    assert float((expected - plain).abs().max()) > 1e-3


def test_a_method_that_goes_on_from_lora_is_tested_with_one() -> None:
    tested = {method for _, method in PAIRS}
    assert tested == {name for name, row in METHODS.items() if row.capabilities.continues}


def test_it_is_measured_from_the_stored_adapter_on_and_resumes_to_the_same_bytes(
    trainings: Any, stored: Callable[[str], Path]
) -> None:
    manifest = inspect(stored("lora"))
    start = Start("adp_source", manifest, stored("lora"), "weights", ["A warning."])
    settings = {"steps": 5, "batch_size": 4, "start": start}
    report, adapter, whole = trainings.run("lora", {"dropout": 0.1}, checkpoint_steps=3, **settings)
    first, _, _ = trainings.run("lora", {"rank": 4}, steps=3, batch_size=4)  # what made the source, and its data
    assert report.evaluation["before"]["loss"] == pytest.approx(first.evaluation["after"]["loss"], rel=1e-5)
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"]
    assert report.continued_from == {"adapter": "adp_source", "method": "lora", "compatibility": "weights"}
    assert "A warning." in report.warnings
    assert inspect(adapter).rank == 4
    again, resumed, _ = trainings.run("lora", {"dropout": 0.1}, resume=whole.checkpoints[3], **settings)
    assert again.resumed_at == 3
    assert digests(resumed) == digests(adapter)
    assert again.evaluation == report.evaluation


@pytest.mark.parametrize(
    ("source", "exports", "variant"),
    [("miss", "lora", "default"), ("miss mini", "lora", "mini"), ("miss bat", "miss", "bat_col")],
)
def test_bone_goes_on_in_the_variant_of_the_adapter_and_resumes_to_the_same_bytes(
    trainings: Any, stored: Callable[[str], Path], source: str, exports: str, variant: str
) -> None:
    start = Start("adp_source", inspect(stored(source)), stored(source))
    settings = {"steps": 4, "batch_size": 4, "start": start}
    report, adapter, whole = trainings.run("bone", {}, checkpoint_steps=2, **settings)
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"]
    assert report.own["variant"] == variant
    assert report.continued_from["method"] == "miss"
    assert inspect(adapter).method == exports
    again, resumed, _ = trainings.run("bone", {}, resume=whole.checkpoints[2], **settings)
    assert again.evaluation == report.evaluation
    assert digests(resumed) == digests(adapter)


def test_smora_goes_on_with_its_routers_and_biases_and_resumes_to_the_same_bytes(
    trainings: Any, stored: Callable[[str], Path]
) -> None:
    source = stored("smora")
    start = Start("adp_source", inspect(source), source)
    settings = {"steps": 4, "batch_size": 4, "start": start}
    report, adapter, whole = trainings.run("smora", {"bias_update_rate": 0.01}, checkpoint_steps=2, **settings)
    assert report.evaluation["after"]["loss"] < report.evaluation["before"]["loss"]
    assert report.continued_from["method"] == "smora"
    fields = ("r", "active_rank", "lora_alpha", "rank_partition", "bias_in_gate")
    one, other = (json.loads((folder / "adapter_config.json").read_text()) for folder in (source, adapter))
    assert [one[name] for name in fields] == [other[name] for name in fields] == [6, 2, 3.0, 1, False]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, adapter))
    for name, value in before.items():
        if name.endswith("lora_bias"):  # three steps of 1e-3, and then four of 1e-2
            moved = ((after[name] - value) / 0.01).round(decimals=3)
            assert set(moved.unique().tolist()) <= set(range(-4, 5))
            assert float(value.abs().max()) == pytest.approx(3e-3)
    again, resumed, _ = trainings.run("smora", {"bias_update_rate": 0.01}, resume=whole.checkpoints[2], **settings)
    assert again.evaluation == report.evaluation
    assert digests(resumed) == digests(adapter)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_alpha": None}, "alpha"),
        ({"active_rank": "2"}, "active_rank"),
        ({"rank_partition": [1]}, "rank_partition"),
    ],
)
def test_a_smora_configuration_that_lacks_a_number_is_refused(
    stored: Callable[[str], Path], changes: dict[str, Any], words: str
) -> None:
    source = inspect(stored("smora"))
    broken = replace(source, config={**source.config, **changes})
    with pytest.raises(RequestInvalid, match=words) as caught:
        continued_options(find_method("smora"), parse_parameters("smora", {}), broken)
    assert caught.value.errors[0].pointer == "/continue_from"


def test_blocks_of_another_shape_than_the_layers_are_refused(
    trainings: Any, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    """What headers do not tell of the form bat: for how wide a layer it was made."""
    source = Path(shutil.copytree(stored("miss bat"), tmp_path / "source"))
    path = source / "adapter_model.safetensors"
    short = {name: value[:1].clone() for name, value in load_file(path).items()}
    save_file(short, path, metadata={"format": "pt"})
    with pytest.raises(FileBroken, match=r"up_proj.miss_block has the shape \(1, 8, 8\), not \(6, 8, 8\)"):
        started(trainings, "bone", source)


def test_an_adapter_of_bat_row_is_refused_by_its_name(trainings: Any) -> None:
    adapter = trainings.run("bone", {"variant": "bat_row", "rank": 8}, steps=1)[1]
    ((pointer, message),) = refused("bone", adapter, {"variant": "bat_row"})
    assert (pointer, message) == ("/continue_from", "it is of type bat_row; method bone goes on from miss")


def test_ranks_and_scalings_of_every_layer_stay(trainings: Any, stored: Callable[[str], Path]) -> None:
    source = inspect(stored("eva"))
    assert len({module.rank for module in source.modules}) > 1
    start = Start("source", source, stored("eva"))
    _, adapter, _ = trainings.run("rslora", {}, steps=1, start=start)
    found = inspect(adapter)
    assert [(m.path, m.rank) for m in found.modules] == [(m.path, m.rank) for m in source.modules]
    assert [m.scaling for m in found.modules] == pytest.approx([m.scaling for m in source.modules])


def test_a_half_precision_file_without_the_models_first_component_is_found(
    trainings: Any, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(stored("lora"), tmp_path / "half")
    tensors = load_file(stored("lora") / "adapter_model.safetensors")
    renamed = {key.replace(".model.model.", ".model."): value.half() for key, value in tensors.items()}
    save_file(renamed, tmp_path / "half" / "adapter_model.safetensors", metadata={"format": "pt"})
    path = tmp_path / "half" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": ["q_proj", "v_proj", "k_proj", "o_proj"]}))
    leaves = ("gate_proj", "up_proj", "down_proj")
    kept = {key: value for key, value in renamed.items() if not any(leaf in key for leaf in leaves)}
    save_file(kept, tmp_path / "half" / "adapter_model.safetensors", metadata={"format": "pt"})
    model = started(trainings, "lora", tmp_path / "half")
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    expected = kept["base_model.model.layers.0.self_attn.q_proj.lora_A.weight"]
    assert torch.equal(layer.lora_A["default"].weight, expected.float())


def refused(method: str, source: Path, parameters: dict[str, Any] | None = None) -> Iterator[tuple[str, str]]:
    with pytest.raises(RequestInvalid) as caught:
        continued_options(find_method(method), parse_parameters(method, parameters or {}), inspect(source))
    assert caught.value.detail
    return ((item.pointer, item.message) for item in caught.value.errors)


@pytest.mark.parametrize(
    ("source", "method", "parameters", "pointer", "words"),
    [
        ("lora", "pissa", {}, "/continue_from", "it is of type lora; method pissa always starts anew"),
        ("lora", "dora", {}, "/continue_from", "method dora goes on from dora"),
        ("vera", "lora", {}, "/continue_from", "it is of type vera; method lora goes on from lora or rslora"),
        ("lora", "lora", {"rank": 8}, "/parameters/rank", "rank is 8, but the adapter has 4"),
        ("lora", "rslora", {"alpha": 8}, "/parameters/alpha", "alpha is 8.0, but the adapter has 4"),
        ("eva", "allora", {}, "/continue_from", "this method needs the same in all"),
        ("vera", "vera", {"rank": 8}, "/parameters/rank", "rank is 8, but the adapter has 32"),
        ("lora", "bone", {}, "/continue_from", "it is of type lora; method bone goes on from miss"),
        (
            "miss",
            "bone",
            {"variant": "bat_row"},
            "/parameters/variant",
            "variant is bat_row, but the adapter has default",
        ),
        ("miss mini", "bone", {"mini_r": 2}, "/parameters/mini_r", "mini_r is 2, but the adapter has 4"),
        ("miss bat", "bone", {"dropout": 0.1}, "/continue_from", "the variant bat_col has no dropout"),
        ("miss mini", "miss", {}, "/continue_from", "another form of MiSS than the balanced one; method bone goes on"),
        ("miss bat", "miss", {}, "/continue_from", "init_weights is 'bat': another form of MiSS"),
        ("smora", "smora", {"active_rank": 3}, "/parameters/active_rank", "active_rank is 3, but the adapter has 2"),
        ("smora", "smora", {"bias_in_gate": True}, "/parameters/bias_in_gate", "is True, but the adapter has False"),
        ("smora", "lora", {}, "/continue_from", "it is of type smora; method lora goes on from lora or rslora"),
        ("lora", "smora", {}, "/continue_from", "it is of type lora; method smora goes on from smora"),
    ],
)
def test_what_a_method_can_not_go_on_from_is_refused(
    stored: Callable[[str], Path], source: str, method: str, parameters: dict[str, Any], pointer: str, words: str
) -> None:
    findings = list(refused(method, stored(source), parameters))
    assert [found for found, _ in findings] == [pointer]
    assert words in findings[0][1]


def test_parameters_that_say_the_same_are_no_contradiction(stored: Callable[[str], Path]) -> None:
    options = parse_parameters("lora", {"rank": 4, "alpha": 8, "dropout": 0.2})
    found = continued_options(find_method("lora"), options, inspect(stored("lora")))
    assert (found.rank, found.numerator, found.dropout) == (4, 8.0, 0.2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bias": "all"}, "bias is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
    ],
)
def test_what_would_be_lost_is_refused(
    stored: Callable[[str], Path], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    source = Path(shutil.copytree(stored("lora"), tmp_path / "source"))
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | changes))
    assert any(words in message for _, message in refused("lora", source))


def test_an_unknown_form_of_miss_and_broken_numbers_are_refused(stored: Callable[[str], Path]) -> None:
    miss, lora = inspect(stored("miss")), inspect(stored("lora"))
    random = replace(miss, config={**miss.config, "init_weights": False})
    broken = replace(lora, report=replace(lora.report, nonfinite={"x.lora_A.weight": 3}))
    for method, manifest, words in (("bone", random, "no form of MiSS"), ("lora", broken, "NaN")):
        with pytest.raises(RequestInvalid, match=words):
            continued_options(find_method(method), parse_parameters(method, {}), manifest)


def test_layers_of_other_shapes_or_places_are_named(trainings: Any, stored: Callable[[str], Path]) -> None:
    manifest = inspect(stored("lora"))
    linear = linear_layers(trainings.load_base())
    fewer = resolve_targets(linear, ["q_proj", "v_proj"])
    with pytest.raises(ShapeMismatch, match="adapts no such layer") as caught:
        place(manifest, fewer)
    assert len(caught.value.errors) == 10  # of two layers, the five that are not q_proj or v_proj
    wider = resolve_targets({path: (d_out + 1, d_in) for path, (d_out, d_in) in linear.items()}, "all-linear")
    with pytest.raises(ShapeMismatch, match="made for a weight of 48×32, the layer has") as caught:
        place(replace(manifest, modules=tuple(m for m in manifest.modules if "gate_proj" in m.path)), wider)
    assert {item.pointer for item in caught.value.errors} == {"/continue_from"}
    with pytest.raises(RequestInvalid, match="Modules trained whole"):
        place(manifest, resolve_targets(linear, "all-linear"), ["score"])


def test_the_base_model_is_compared_as_in_a_merge() -> None:
    base = BaseModelRef("acme/one", "hub", "acme/one", revision="a" * 40)
    assert check_base("adp", base, base, "revision") == ("revision", [])
    level, warnings = check_base("adp", None, base, None)
    assert level == "shape"
    assert "Nothing but names and shapes" in warnings[0]
    other = BaseModelRef.named("acme/two")
    with pytest.raises(BaseMismatch, match="belongs to another base model"):
        check_base("adp", other, base, None)
    with pytest.raises(BaseMismatch, match="minimum_compatibility asks for 'weights'"):
        check_base("adp", base, base, "weights")
    level, warnings = check_base("adp", other, base, "shape")
    assert level == "shape"
    assert "was made for another base model" in warnings[0]
