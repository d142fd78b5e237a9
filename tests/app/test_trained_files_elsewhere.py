"""What was trained over HTTP, loaded by stock libraries in new processes: every module is there, and the outputs are
those of the base model with W + ΔW written into its weights by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

from test_train_with_pool import register, train, unpacked

from artifacts.adapter import Adapter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LANGUAGE_MODEL = """
import sys
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

base, adapter, how, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
if how == "peft":
    model = PeftModel.from_pretrained(model, adapter).eval()
else:
    model.load_adapter(adapter)
layers = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
with torch.no_grad():
    torch.save({"layers": len(layers), "output": model(torch.arange(24).reshape(2, 12)).logits}, out)
"""

PIPELINE = """
import sys
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

base, adapter, _, out = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
pipeline.load_lora_weights(adapter)
layers = [name for name, module in pipeline.unet.named_modules() if isinstance(module, BaseTunerLayer)]
torch.manual_seed(1)
with torch.no_grad():
    sample = pipeline.unet(torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 16, 16)).sample
torch.save({"layers": len(layers), "output": sample}, out)
"""


def elsewhere(program: str, base: Path, adapter: Path, how: str, out: Path) -> dict[str, Any]:
    """What the program saves in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", program, str(base), str(adapter), how, str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = torch.load(out)
    return found


def write_into(model: torch.nn.Module, adapter: Path, prefix: str = "") -> int:
    """W + ΔW in every module that the adapter has. Returns how many they are."""
    opened = Adapter.open(adapter)
    with torch.no_grad():
        for path, found in opened.items():
            weight = model.get_submodule(path.removeprefix(prefix)).weight
            delta = found.scaling * found.B.double() @ found.A.double()
            weight += delta.reshape(weight.shape).to(weight.dtype)  # type: ignore[operator]
    return len(opened)


def test_a_language_models_adapter_in_peft_and_in_transformers(serve: Any, tmp_path: Path) -> None:
    from tiny_base import sums, write_tiny_base
    from transformers import AutoModelForCausalLM

    base = write_tiny_base(tmp_path / "roots" / "tiny")
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(base.parent,))
    inputs = register(server, base, sums())
    body = {**inputs, "parameters": {"rank": 4, "alpha": 6}, "training": {"steps": 20, "learning_rate": 0.01}}
    trained = train(server, body, 300)["result"]["adapters"][0]
    folder, _ = unpacked(server, trained, tmp_path / "trained")

    model, ids = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval(), torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        plain = model(ids).logits
        count = write_into(model, folder)
        expected = model(ids).logits
    assert float((plain - expected).abs().max()) > 0.1

    packed = server.client.get(f"/adapters/{trained}/download", params={"format": "gguf"})
    assert packed.status_code == 200, packed.text
    back = server.upload([("file", ("back.gguf", packed.content))], {"base_model": inputs["base_model"]})
    assert (back.status_code, back.json()["id"]) == (200, trained)  # the same numbers and scalings: the same adapter

    for place, how in ((folder, "peft"), (folder, "transformers")):
        found = elsewhere(LANGUAGE_MODEL, base, place, how, tmp_path / "out.pt")
        assert found["layers"] == count > 0
        torch.testing.assert_close(found["output"], expected, rtol=0, atol=1e-5)


def test_a_unets_adapter_in_diffusers(serve: Any, tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel
    from tiny_pipeline import write_images, write_tiny_pipeline

    base = write_tiny_pipeline(tmp_path / "roots" / "pipeline")
    server = serve(pool="local", devices="cpu:1", max_wait_seconds=60, model_roots=(base.parent,))
    model = server.client.post("/models", json={"path": str(base)}).json()["id"]
    archive = write_images(tmp_path / "images.zip").read_bytes()
    dataset = server.client.post("/datasets", files=[("file", ("squares.zip", archive))]).json()["id"]
    task = {"type": "text-to-image", "resolution": 32}
    training = {"steps": 10, "batch_size": 4, "learning_rate": 0.01}
    body = {"base_model": model, "dataset": dataset, "task": task, "parameters": {"rank": 4, "alpha": 6}}
    body["evaluation"] = {"validation_fraction": 0.3}
    trained = train(server, {**body, "training": training}, 600)["result"]["adapters"][0]

    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    for layout in ("safetensors", "diffusers"):
        answer = server.client.get(f"/adapters/{trained}/download", params={"format": layout})
        folder = tmp_path / layout
        folder.mkdir()
        (folder / "pytorch_lora_weights.safetensors").write_bytes(answer.content)
        if layout == "safetensors":
            torch.manual_seed(1)
            inputs = torch.randn(1, 4, 16, 16), torch.tensor([7]), torch.randn(1, 16, 16)
            with torch.no_grad():
                plain = unet(*inputs).sample
                count = write_into(unet, folder / "pytorch_lora_weights.safetensors", "unet.")
                expected = unet(*inputs).sample
            assert float((plain - expected).abs().max()) > 1e-3
        found = elsewhere(PIPELINE, base, folder, layout, tmp_path / "out.pt")
        assert found["layers"] == count > 0
        torch.testing.assert_close(found["output"], expected, rtol=0, atol=1e-5)
