"""MiSS adapters, and BONE ones from before PEFT renamed it: what they are, and the same function as a LoRA."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from artifacts.adapter import Adapter
from artifacts.base_model import check_modules
from artifacts.errors import FileBroken, FormatUnknown, RankwiseError, ShapeMismatch
from artifacts.intake import IntakeLimits, inspect, receive
from artifacts.manifest import AdapterManifest
from artifacts.miss_keys import SIDES_KEY

R, D_IN, D_OUT = 4, 10, 12  # r does not divide the inputs
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.name_or_path = "acme/net"
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.q_proj = nn.Linear(D_IN, D_OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x)


def saved(directory: Path, *, d_in: int = D_IN, **fields: Any) -> tuple[nn.Module, Path]:
    """A MiSS adapter as PEFT saves it, with numbers in its block."""
    config = MissConfig(**{"r": R, "target_modules": ["q_proj"], **fields})
    net = Net()
    if d_in != D_IN:
        net.q_proj = nn.Linear(d_in, D_OUT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT notes that the toy model has no configuration of transformers
        model = get_peft_model(net, config)
        block = model.base_model.model.q_proj.miss_block["default"]
        with torch.no_grad():
            block.copy_(torch.randn(block.shape, generator=torch.Generator().manual_seed(3)))
        model.save_pretrained(directory)
    (directory / "README.md").unlink()
    return model, directory


def as_bone(directory: Path, **config: Any) -> None:
    """Rewrite a MiSS adapter under the names that PEFT's BoneConfig gave."""
    tensors = {name.replace(".miss_", ".bone_"): value for name, value in load_file(directory / WEIGHTS).items()}
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    document = json.loads((directory / CONFIG).read_text())
    for field in ("mini_r", "miss_dropout"):
        del document[field]
    (directory / CONFIG).write_text(json.dumps(document | {"peft_type": "BONE"} | config))


def taken_in(source: Path, workdir: Path) -> tuple[Path, AdapterManifest]:
    directory = receive([(path.name, path) for path in sorted(source.iterdir())], workdir, IntakeLimits())
    return directory, inspect(directory)


@pytest.mark.parametrize(
    ("fields", "rank"),
    [({}, R), ({"init_weights": "mini", "mini_r": 2}, 2), ({"init_weights": "mini", "mini_r": 6}, R)],
)
def test_the_factors_of_the_tile_forms_are_what_peft_computes(
    tmp_path: Path, fields: dict[str, Any], rank: int
) -> None:
    model, directory = saved(tmp_path / "a", **fields)
    manifest = inspect(directory)
    assert (manifest.method, manifest.mergeable, manifest.rank, manifest.base_model) == ("miss", True, rank, "acme/net")
    [module] = manifest.modules
    assert (module.path, module.rank, module.scaling, module.complete) == ("q_proj", rank, 1.0, False)
    assert any("does not tell the sides" in warning for warning in manifest.report.warnings)
    adapter = Adapter.open(directory)
    with pytest.raises(ShapeMismatch, match="does not tell the sides"):
        adapter["q_proj"]
    factors = adapter.factors(module.with_sides(D_OUT, D_IN))
    eye = torch.eye(D_IN)
    with torch.no_grad():
        expected = (model(eye) - Net()(eye)).T
    torch.testing.assert_close(factors.B @ factors.A, expected, atol=1e-5, rtol=0)
    adapter.release("q_proj")


def test_sides_that_the_block_does_not_fit_are_refused(tmp_path: Path) -> None:
    _, directory = saved(tmp_path / "a")
    [module] = inspect(directory).modules
    for sides in ((D_OUT + 1, D_IN), (D_OUT, R - 1)):
        with pytest.raises(ShapeMismatch, match=f"a block of {R}×{D_OUT} does not fit"):
            module.with_sides(*sides)
        assert check_modules((("q_proj", *sides),), [module])
    assert check_modules((("q_proj", D_OUT, D_IN),), [module]) == []
    assert "no such module" in check_modules((("v_proj", D_OUT, D_IN),), [module])[0]


def test_the_metadata_may_tell_the_sides_and_is_not_believed_blindly(tmp_path: Path) -> None:
    _, directory = saved(tmp_path / "a")
    tensors = load_file(directory / WEIGHTS)

    def told(text: str) -> AdapterManifest:
        save_file(tensors, directory / WEIGHTS, metadata={SIDES_KEY: text})
        return inspect(directory)

    assert told(json.dumps({"q_proj": [D_OUT, D_IN]})).modules[0].complete
    wrong = told(json.dumps({"q_proj": [D_OUT + 1, D_IN]}))
    assert not wrong.modules[0].complete
    assert any("does not fit the blocks" in warning for warning in wrong.report.warnings)
    for text in ("{", "[]", '{"q_proj": [12]}', '{"q_proj": [12, true]}', '{"q_proj": [12, 99999999999]}', "[" * 9999):
        assert not told(text).modules[0].complete


def test_bat_is_stored_and_its_merge_refused_with_the_reason(tmp_path: Path) -> None:
    _, directory = saved(tmp_path / "a", d_in=8, init_weights="bat")
    manifest = inspect(directory)
    assert (manifest.method, manifest.mergeable, manifest.rank, manifest.modules) == ("miss", False, R, ())
    assert "depends on the base weights" in str(manifest.refusal)


def test_an_old_bone_becomes_the_miss_that_todays_peft_loads(tmp_path: Path) -> None:
    model, directory = saved(tmp_path / "a")
    as_bone(directory)
    before = load_file(directory / WEIGHTS)
    stored, manifest = taken_in(directory, tmp_path / "work")
    assert (manifest.method, manifest.mergeable, manifest.config["peft_type"]) == ("miss", True, "MISS")
    assert manifest.config["init_weights"] is True
    said = " ".join(manifest.report.warnings)
    assert "1 tensors were renamed" in said
    assert "base_model.model.q_proj.bone_block" in said
    assert "peft_type was BONE" in said
    # the uploaded files are not touched, the values are the same, and PEFT loads what is stored
    assert load_file(directory / WEIGHTS).keys() == before.keys() == {"base_model.model.q_proj.bone_block"}
    loaded = PeftModel.from_pretrained(Net(), str(stored))
    x = torch.ones(2, D_IN)
    assert torch.equal(loaded(x), model(x))
    # the same adapter under either name is one
    _, other = saved(tmp_path / "b")
    document = json.loads((other / CONFIG).read_text())
    for field in ("mini_r", "miss_dropout"):
        del document[field]
    (other / CONFIG).write_text(json.dumps(document))
    assert taken_in(other, tmp_path / "again")[1].identity_digest == manifest.identity_digest


def test_the_first_form_of_bone_becomes_bat(tmp_path: Path) -> None:
    """Before PEFT 0.14, `init_weights: true` of BONE was the guided form; its blocks have three dimensions."""
    model, directory = saved(tmp_path / "a", d_in=8, init_weights="bat")
    as_bone(directory, init_weights=True)
    stored, manifest = taken_in(directory, tmp_path / "work")
    assert manifest.config["init_weights"] == "bat"
    assert any('init_weights was true and is now "bat"' in warning for warning in manifest.report.warnings)
    assert not manifest.mergeable
    net = Net()
    net.q_proj = model.base_model.model.q_proj.base_layer
    x = torch.ones(2, 8)
    expected = model(x)
    assert torch.equal(PeftModel.from_pretrained(net, str(stored))(x), expected)


def test_digests_of_the_upload_do_not_stand_for_rewritten_files(tmp_path: Path) -> None:
    _, directory = saved(tmp_path / "a")
    as_bone(directory)
    files = [(path.name, path) for path in sorted(directory.iterdir())]
    stored = receive(files, tmp_path / "work", IntakeLimits(), digests={path: "0" * 64 for _, path in files})
    manifest = inspect(stored)
    assert {entry.sha256 for entry in manifest.files} & {"0" * 64} == set()
    assert {entry.path for entry in manifest.files} == {WEIGHTS, CONFIG}


def test_a_miss_of_today_is_stored_as_it_came(tmp_path: Path) -> None:
    _, directory = saved(tmp_path / "a")
    stored, _ = taken_in(directory, tmp_path / "work")
    for name in (WEIGHTS, CONFIG):
        assert (stored / name).read_bytes() == (directory / name).read_bytes()


BLOCK = "base_model.model.{}.miss_block"


@pytest.mark.parametrize(
    ("shapes", "config", "kind", "words"),
    [
        ({"q": [4, 12], "v": [3, 4, 4]}, {}, FileBroken, "mixes two variants"),
        ({"q": [4, 12]}, {"init_weights": "bat"}, FileBroken, "has two dimensions"),
        ({"q": [5, 12]}, {}, FileBroken, "has not the rank 4"),
        ({"q": [3, 5, 5]}, {"init_weights": "bat"}, FileBroken, "has not the sides 4×4"),
        ({"q": [4, 3]}, {"init_weights": "mini", "mini_r": 2}, FileBroken, "has not the mini_r 2"),
        ({"q": [4]}, {}, FileBroken, "is no block"),
    ],
)
def test_blocks_that_contradict_each_other_or_the_configuration_are_refused(
    tmp_path: Path, write_tensors: Any, shapes: dict[str, list[int]], config: dict[str, Any], kind: Any, words: str
) -> None:
    document = {"peft_type": "MISS", "r": 4, "target_modules": ["q", "v"], **config}
    (tmp_path / CONFIG).write_text(json.dumps(document))
    write_tensors(tmp_path / WEIGHTS, {BLOCK.format(name): ("F32", shape) for name, shape in shapes.items()})
    with pytest.raises(kind, match=words):
        inspect(tmp_path)


def test_blocks_of_whole_numbers_and_files_without_blocks_are_refused(tmp_path: Path, write_tensors: Any) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "BONE", "r": 4, "target_modules": ["q"]}))
    write_tensors(tmp_path / WEIGHTS, {BLOCK.format("q"): ("I32", [4, 12])})
    with pytest.raises(FileBroken, match="floating-point"):
        inspect(tmp_path)
    write_tensors(tmp_path / WEIGHTS, {"base_model.model.q.lora_A.weight": ("F32", [4, 12])})
    with pytest.raises(FormatUnknown, match="block of MiSS"):
        inspect(tmp_path)


def test_both_names_of_one_block_are_refused(tmp_path: Path, write_tensors: Any) -> None:
    source = tmp_path / "a"
    source.mkdir()
    (source / CONFIG).write_text(json.dumps({"peft_type": "BONE", "r": 4, "target_modules": ["q"]}))
    names = [BLOCK.format("q"), BLOCK.format("q").replace("miss", "bone")]
    write_tensors(source / WEIGHTS, {name: ("F32", [4, 12]) for name in names})
    with pytest.raises(FileBroken, match="both"):
        inspect(source)
    with pytest.raises(RankwiseError, match="holds both"):
        taken_in(source, tmp_path / "work")
    assert not (tmp_path / "work" / "adapter").exists()


def test_what_is_no_block_is_explained(tmp_path: Path, write_tensors: Any) -> None:
    document = {"peft_type": "MISS", "r": 4, "target_modules": ["q"], "modules_to_save": ["score"], "bias": "all"}
    (tmp_path / CONFIG).write_text(json.dumps(document))
    others = ("score.weight", "q.bias", "odd.thing")
    tensors = {BLOCK.format("q"): ("F32", [4, 12])} | {f"base_model.model.{name}": ("F32", [2]) for name in others}
    write_tensors(tmp_path / WEIGHTS, tensors)
    manifest = inspect(tmp_path)
    reasons = {entry.key.removeprefix("base_model.model."): entry.reason for entry in manifest.report.ignored}
    assert "full copy" in reasons["score.weight"]
    assert "bias of the base" in reasons["q.bias"]
    assert "does not load it" in reasons["odd.thing"]
    assert not manifest.mergeable
    assert "modules_to_save" in str(manifest.refusal)
    assert "bias is set" in str(manifest.refusal)
