"""Adapters in other formats than PEFT's over HTTP: what is told of every key, what is refused, what is handed out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

STEM = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
STRANGE = "lora_unet_down_blocks_9_attentions_0_proj_in"
PATH = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def file_of(shapes: Mapping[str, Sequence[int]], alpha: float = 2.0) -> bytes:
    random = np.random.default_rng(0)
    tensors = {
        key: np.full(shape, alpha, np.float32) if key.endswith(".alpha") else random.standard_normal(shape, np.float32)
        for key, shape in shapes.items()
    }
    return save(tensors)


def pair(stem: str, side: int = 32) -> dict[str, list[int]]:
    return {f"{stem}.lora_down.weight": [4, side], f"{stem}.lora_up.weight": [side, 4], f"{stem}.alpha": []}


def send(server: Any, shapes: Mapping[str, Sequence[int]], name: str = "x.safetensors") -> Any:
    return server.upload([("file", (name, file_of(shapes)))])


def test_a_kohya_file_is_stored_and_every_key_told(server: Any) -> None:
    answer = send(server, pair(STEM))
    body = answer.json()
    assert answer.status_code == 201, body
    assert (body["format"], body["method"], body["mergeable"]) == ("kohya", "lora", True)
    assert [(module["path"], module["scaling"]) for module in body["modules"]] == [(PATH, 0.5)]
    assert body["facts"]["architecture"] == "sd1"
    assert body["facts"]["composable"] == {"able": True, "reason": None}
    keys = server.client.get(f"/adapters/{body['id']}/keys").json()
    assert keys["next"] is None
    assert {(item["key"], item["use"], item["role"]) for item in keys["items"]} == {
        (f"{STEM}.lora_down.weight", "used", "lora_A"),
        (f"{STEM}.lora_up.weight", "used", "lora_B"),
        (f"{STEM}.alpha", "used", "alpha"),
    }
    assert all(item["modules"] == [PATH] for item in keys["items"])


def test_keys_come_in_pages_and_can_be_filtered(server: Any) -> None:
    body = send(server, {**pair(STEM), **pair(STRANGE)}).json()
    assert body["facts"]["partial"]
    assert not body["mergeable"]
    assert STRANGE in body["refusal"]
    url, seen, cursor = f"/adapters/{body['id']}/keys", [], None
    while True:
        page = server.client.get(url, params={"limit": 2} | ({"cursor": cursor} if cursor else {})).json()
        seen += [item["key"] for item in page["items"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert sorted(seen) == sorted([*pair(STEM), *pair(STRANGE)])
    ignored = server.client.get(url, params={"use": "ignored"}).json()["items"]
    assert {item["key"] for item in ignored} == set(pair(STRANGE))
    assert all("has no module of this name" in item["note"] for item in ignored)


@pytest.mark.parametrize("cursor", ["x", "99", "-1", "1e3"])
def test_a_cursor_of_another_list_is_refused(server: Any, cursor: str) -> None:
    body = send(server, pair(STEM)).json()
    answer = server.client.get(f"/adapters/{body['id']}/keys", params={"cursor": cursor})
    assert answer.status_code == 422
    assert answer.json()["errors"][0]["pointer"].endswith("cursor")


def test_what_is_no_lora_is_kept_described_and_not_merged(server: Any) -> None:
    shapes = {f"{STEM}.lokr_w1": [4, 4], f"{STEM}.lokr_w2": [8, 8], f"{STEM}.alpha": []}
    body = send(server, shapes).json()
    (module,) = body["facts"]["typed"]
    assert (body["method"], body["module_count"], module["type"], module["d_out"]) == ("lokr", 1, "lokr", 32)
    assert body["facts"]["composable"]["able"] is False
    merge = {"adapters": [{"id": body["id"]}], "method": "cat", "parameters": {}}
    refused = server.client.post("/merge", json=merge)
    assert (refused.status_code, refused.json()["code"]) == (422, "not_mergeable")
    assert "Kronecker" in refused.json()["detail"]


def test_a_file_of_another_format_is_handed_out_as_it_came(server: Any) -> None:
    content = file_of(pair(STEM))
    body = server.upload([("file", ("x.safetensors", content))]).json()
    url = f"/adapters/{body['id']}/download"
    assert server.client.get(url, params={"format": "safetensors"}).content == content


def test_keys_of_a_peft_adapter(server: Any, adapter_files: Any) -> None:
    body = server.upload(adapter_files().parts()).json()
    items = server.client.get(f"/adapters/{body['id']}/keys").json()["items"]
    assert len(items) == body["report"]["used_keys"] + len(body["report"]["ignored"])
    assert {item["role"] for item in items} >= {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"clip_l": [2, 768]}, "textual-inversion"),
        (
            {
                "lora_unet_hovercraft_0_eels.lora_down.weight": [4, 8],
                "lora_unet_hovercraft_0_eels.lora_up.weight": [8, 4],
            },
            "no stored architecture",
        ),
        ({f"{STEM}.lora_down.weight": [4, 32]}, "up (B) matrix is missing"),
    ],
)
def test_refusals_say_what_it_is(server: Any, shapes: dict[str, list[int]], words: str) -> None:
    answer = send(server, shapes)
    assert answer.status_code == 422
    assert words in answer.json()["detail"]
    server.assert_nothing_left()
