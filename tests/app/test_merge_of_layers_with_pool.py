"""Merges over HTTP of what stock PEFT saves: ranks, scalings and patterns, unequal modules, layers of every kind."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, MissConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

WEIGHTS = (1.0, -0.5)
LAYERS = {"embed", "conv", "mix", "proj", "extra"}
CONFIGS: dict[str, dict[str, Any]] = {
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"proj": 3, "conv": 2},
        "alpha_pattern": {"proj": 5},
        "target_modules": sorted(LAYERS),
    },
    "rslora": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {"mix": 5},
        "alpha_pattern": {"embed": 7},
        "target_modules": sorted(LAYERS - {"extra"}),
    },
}


class Net(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(3, 5, (3, 2))
        self.mix = Conv1D(7, 8)
        self.proj = nn.Linear(8, 7)
        self.extra = nn.Linear(8, 7)


def saved(folder: Path, config: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(Net(), config)
        model.save_pretrained(folder, save_embedding_layers=False)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "tiny"}))
    return folder


def deltas(folder: Path) -> dict[str, Tensor]:
    """Layer → ΔW as the layer stores its weight, by stock PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(Net(), folder)
    found = {}
    for name, module in model.base_model.model.named_children():
        if hasattr(module, "get_delta_weight"):
            before = module.get_base_layer().weight.detach().clone()
            module.merge()
            found[name] = (module.get_base_layer().weight.detach() - before).double()
    return found


class Service:
    """A server with a pool, and what is uploaded to it."""

    def __init__(self, server: Any, folder: Path) -> None:
        self.server, self.folder, self.count = server, folder, 0

    def upload(self, folder: Path) -> str:
        files = [
            ("file", (name, (folder / name).read_bytes()))
            for name in ("adapter_model.safetensors", "adapter_config.json")
        ]
        answer = self.server.upload(files)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def post(self, ids: list[str], weights: Any, method: str, **parameters: Any) -> Any:
        pool = [{"id": key, "weight": weight} for key, weight in zip(ids, weights, strict=True)]
        body = {"adapters": pool, "method": method, "parameters": {"output_dtype": "float32", **parameters}}
        return self.server.client.post("/merge", json=body, headers={"Prefer": "wait=120"}, timeout=150)

    def merged(self, ids: list[str], weights: Any, method: str, **parameters: Any) -> tuple[Path, dict[str, Any]]:
        """The downloaded result, and the report."""
        answer = self.post(ids, weights, method, **parameters)
        assert answer.json()["state"] == "succeeded", answer.text
        result = answer.json()["result"]
        archive = self.server.client.get(f"/adapters/{result['adapters'][0]}/download")
        self.count += 1
        out = self.folder / f"merged-{self.count}"
        with zipfile.ZipFile(io.BytesIO(archive.content)) as files:
            files.extractall(out)
        (config,) = out.rglob("adapter_config.json")
        return config.parent, result["report"]


@pytest.fixture(scope="module")
def service(module_servers: Any, tmp_path_factory: pytest.TempPathFactory) -> Service:
    return Service(
        module_servers(pool="local", devices="cpu:1", max_wait_seconds=120), tmp_path_factory.mktemp("layers")
    )


@pytest.fixture(scope="module")
def sources(service: Service) -> tuple[list[str], list[dict[str, Tensor]]]:
    """Ids and deltas of both adapters."""
    folders = [
        saved(service.folder / name, LoraConfig(init_lora_weights=False, fan_in_fan_out=True, **config), seed)
        for seed, (name, config) in enumerate(CONFIGS.items())
    ]
    return [service.upload(folder) for folder in folders], [deltas(folder) for folder in folders]


def exact(found: list[dict[str, Tensor]], layer: str) -> Tensor:
    return torch.stack([w * d[layer] for w, d in zip(WEIGHTS, found, strict=True) if layer in d]).sum(0)


def flat(name: str, delta: Tensor) -> Tensor:
    return delta.flatten(1) if name == "conv" else delta


def test_the_weighted_sum_of_all_layers(service: Service, sources: Any) -> None:
    ids, found = sources
    folder, report = service.merged(ids, WEIGHTS, "cat")
    result = deltas(folder)
    assert set(result) == LAYERS
    for layer, delta in result.items():
        torch.testing.assert_close(delta, exact(found, layer), rtol=1e-5, atol=1e-5)
    assert report["rank"] == 9  # of mix, 4 + 5; the others are filled up


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_any_rank_is_the_best_approximation(service: Service, sources: Any, rank: int) -> None:
    ids, found = sources
    folder, _ = service.merged(ids, WEIGHTS, "svd", rank=rank)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == rank
    for layer, delta in deltas(folder).items():
        U, S, Vh = torch.linalg.svd(flat(layer, exact(found, layer)), full_matrices=False)
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        torch.testing.assert_close(flat(layer, delta), best, rtol=1e-4, atol=1e-4)


def test_modules_that_only_one_has(service: Service, sources: Any) -> None:
    ids, found = sources
    folder, _ = service.merged(ids, WEIGHTS, "linear", missing_modules="intersection")
    result = deltas(folder)
    assert set(result) == LAYERS - {"extra"}
    torch.testing.assert_close(result["proj"], exact(found, "proj"), rtol=1e-5, atol=1e-5)
    refused = service.post(ids, WEIGHTS, "linear", missing_modules="error")
    assert (refused.status_code, refused.json()["code"]) == (422, "merge_refused"), refused.text
    assert "extra" in refused.text


def test_lego_of_one_adapter_with_patterns_is_that_adapter(service: Service, sources: Any) -> None:
    ids, found = sources
    for position, rank in ((0, 4), (1, 5)):
        folder, report = service.merged([ids[position]], [1.0], "lego", rank=rank, output_reweight=False)
        result = deltas(folder)
        assert set(result) == set(found[position])
        for layer, delta in result.items():
            torch.testing.assert_close(delta, found[position][layer], rtol=1e-4, atol=1e-5)
        assert report["rank"] == rank


def test_adapters_that_share_lora_a_keep_it(service: Service) -> None:
    """As those of FFA-LoRA do."""
    from safetensors.torch import load_file, save_file

    config = LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, target_modules=["proj", "extra"])
    folders = [saved(service.folder / f"ffa-{seed}", config, seed) for seed in (10, 11)]
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    shared = {name: value for name, value in tensors[0].items() if "lora_A" in name}
    save_file({**tensors[1], **shared}, folders[1] / "adapter_model.safetensors")
    found = [deltas(folder) for folder in folders]
    ids = [service.upload(one) for one in folders]
    folder, report = service.merged(ids, WEIGHTS, "linear")
    for layer, delta in deltas(folder).items():
        torch.testing.assert_close(delta, exact(found, layer), rtol=1e-5, atol=1e-5)
    assert report["rank"] == 3
    assert report["total"]["figures"] == {"shared_lora_A": 1.0}


def test_a_miss_adapter_beside_a_lora(service: Service) -> None:
    bone = saved(service.folder / "bone", MissConfig(r=4, init_weights=False, target_modules=["proj"]), 20)
    lora = saved(
        service.folder / "lora", LoraConfig(r=2, init_lora_weights=False, target_modules=["proj"], lora_alpha=1), 21
    )
    found = [deltas(bone), deltas(lora)]
    assert float(found[0]["proj"].norm()) > 0
    folder, _ = service.merged([service.upload(bone), service.upload(lora)], WEIGHTS, "cat")
    torch.testing.assert_close(deltas(folder)["proj"], exact(found, "proj"), rtol=1e-5, atol=1e-5)
