"""The job kind "convert": a stored LoHa and a stored DoRA become LoRAs that can be merged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from artifacts import intake
from storage import adapters
from storage.blobs import BlobStore
from workers.kinds import KINDS

SECONDS = 200  # transformers is imported for the first time


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_other_types_become_loras_that_can_be_merged(
    train_pool: Any, base_id: str, tiny_base: Path, tmp_path: Path
) -> None:
    from peft import LoHaConfig, LoraConfig, OFTConfig, get_peft_model

    pool = train_pool
    configs = {
        "loha": LoHaConfig(r=2, target_modules=["q_proj"]),
        "dora": LoraConfig(r=2, use_dora=True, init_lora_weights=False, target_modules=["q_proj"]),
        "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
    }
    ids = {}
    for name, config in configs.items():
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_base), config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.add_(0.1 * torch.randn(parameter.shape))
            model.save_pretrained(tmp_path / name)
        ids[name] = _store(pool, tmp_path / name, base_id)
    wanted = {
        name: pool.submit("convert", adapter=key, to="lora", base_model=base_id, rank=4) for name, key in ids.items()
    }
    pool.start(kinds=KINDS, model_roots=(str(tiny_base.parent),))
    jobs = {name: pool.ended(job_id, seconds=SECONDS) for name, job_id in wanted.items()}
    assert {name: job.error for name, job in jobs.items()} == dict.fromkeys(configs)
    loha, dora, oft = (jobs[name].result["report"] for name in ("loha", "dora", "oft"))
    assert (loha["exact"], loha["rank"], loha["from"]) == (True, 4, "loha")
    assert (dora["exact"], dora["rank"], dora["from"]) == (False, 4, "dora")
    assert (oft["exact"], oft["rank"], oft["from"]) == (False, 4, "oft")
    assert 0 < dora["relative_error"] < 1
    assert 0 < oft["relative_error"] < 1
    made = [job.result["adapters"][0] for job in jobs.values()]
    with pool.database.read() as session:
        for adapter_id, parent in zip(made, ids.values(), strict=True):
            row = adapters.get_adapter(session, adapter_id)
            assert (row.method, row.mergeable, row.origin) == ("lora", True, "convert")
            (edge,) = adapters.lineage(session, adapter_id).edges
            assert (edge.parent_id, edge.recipe["to"]) == (parent, "lora")
    merge = pool.submit("merge", adapters=[{"id": key} for key in made], method="cat", parameters={})
    assert pool.ended(merge, seconds=SECONDS).error is None


def _store(pool: Any, folder: Path, model_id: str) -> str:
    (folder / "README.md").unlink(missing_ok=True)
    manifest = intake.inspect(folder)
    blobs = BlobStore(pool.settings().blob_url)
    with pool.database.write() as session:
        adapters.reserve_blobs(session, manifest.files)
    for entry in manifest.files:
        blobs.put_file(folder / entry.path, entry.sha256)
    with pool.database.write() as session:
        row, _ = adapters.add_adapter(session, manifest, name=folder.name, model_id=model_id)
    return row.id
