from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from examples.smollm2.combine import average_factors, concatenate_factors

MODULES = {"base_model.model.layers.0.self_attn.q_proj": (6, 5), "base_model.model.layers.0.mlp.up_proj": (7, 5)}
TOLERANCE = 1e-6


def _adapter(directory: Path, rank: int, alpha: float, *, rslora: bool = False, modules: int = 2) -> Path:
    directory.mkdir()
    tensors = {}
    for module, (d_out, d_in) in list(MODULES.items())[:modules]:
        tensors[f"{module}.lora_A.weight"] = torch.randn(rank, d_in).bfloat16()
        tensors[f"{module}.lora_B.weight"] = torch.randn(d_out, rank).bfloat16()
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": {}, "alpha_pattern": {}}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    return directory


def _factors(directory: Path, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    config = json.loads((directory / "adapter_config.json").read_text())
    divisor = config["r"] ** 0.5 if config["use_rslora"] else config["r"]
    tensors = load_file(directory / "adapter_model.safetensors")
    a, b = tensors[f"{module}.lora_A.weight"].float(), tensors[f"{module}.lora_B.weight"].float()
    assert a.shape[0] == config["r"] == b.shape[1]
    return a, b, config["lora_alpha"] / divisor


def _delta(directory: Path, module: str) -> torch.Tensor:
    a, b, scaling = _factors(directory, module)
    return scaling * b @ a


@pytest.mark.parametrize("module", MODULES)
def test_concatenation_is_the_scaled_sum_of_the_updates(tmp_path: Path, module: str) -> None:
    first, second = _adapter(tmp_path / "a", 2, 8), _adapter(tmp_path / "b", 3, 6, rslora=True)
    concatenate_factors(first, second, tmp_path / "out", scale=0.5**0.5)
    expected = 0.5**0.5 * (_delta(first, module) + _delta(second, module))
    torch.testing.assert_close(_delta(tmp_path / "out", module), expected, rtol=TOLERANCE, atol=1e-5)
    assert _factors(tmp_path / "out", module)[0].shape[0] == 5


@pytest.mark.parametrize("module", MODULES)
def test_average_has_half_of_each_update_and_the_cross_terms(tmp_path: Path, module: str) -> None:
    first, second = _adapter(tmp_path / "a", 2, 4), _adapter(tmp_path / "b", 2, 4)
    average_factors(first, second, tmp_path / "out")
    (a1, b1, scaling), (a2, b2, _) = _factors(first, module), _factors(second, module)
    expected = scaling * (b1 @ a1 + b2 @ a2 + b1 @ a2 + b2 @ a1) / 4
    torch.testing.assert_close(_delta(tmp_path / "out", module), expected, rtol=TOLERANCE, atol=1e-5)


def test_average_of_different_ranks_is_refused(tmp_path: Path) -> None:
    first, second = _adapter(tmp_path / "a", 2, 4), _adapter(tmp_path / "b", 3, 4)
    with pytest.raises(ValueError, match="different ranks"):
        average_factors(first, second, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_different_modules_are_refused(tmp_path: Path) -> None:
    first, second = _adapter(tmp_path / "a", 2, 4), _adapter(tmp_path / "b", 2, 4, modules=1)
    with pytest.raises(ValueError, match=r"different modules.*up_proj"):
        concatenate_factors(first, second, tmp_path / "out")


def test_patterns_are_refused(tmp_path: Path) -> None:
    first, second = _adapter(tmp_path / "a", 2, 4), _adapter(tmp_path / "b", 2, 4)
    config_file = first / "adapter_config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"rank_pattern": {"q_proj": 4}}))
    with pytest.raises(ValueError, match="of its own per module"):
        concatenate_factors(first, second, tmp_path / "out")
