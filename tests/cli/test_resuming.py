"""`rankwise adapters add --resume`: what was interrupted is gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.cli import resuming
from app.cli.client import Client, ProblemError


def test_a_folder_is_sent_in_pieces_and_gives_the_same_adapter(
    cli: Callable[..., Any], remote: str, adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "APPEND_BYTES", 1500)
    # the service may have the adapter of other tests already, under the name that it was first sent with
    config = adapters[0] / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "lora_alpha": 7}))
    first = cli("adapters", "add", adapters[0], "--resume", "--name", "pieces", "--tag", "x", "--json")
    assert first.code == 0, first.err
    assert (first.json["name"], first.json["tags"]) == ("pieces", ["x"])
    again = cli("adapters", "add", adapters[0], "--json")
    assert again.json["id"] == first.json["id"]
    with Client(remote) as client:
        assert client.get("/uploads", state="open")["items"] == []


def test_an_interrupted_upload_is_gone_on_with(
    cli: Callable[..., Any], remote: str, adapters: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "APPEND_BYTES", 1500)
    monkeypatch.setattr(resuming, "RECONNECT_SECONDS", 0.0)
    real, sent = Client.send, list[tuple[str, str]]()
    broken_after = 3

    def breaking(self: Client, method: str, path: str, **options: Any) -> Any:
        if method == "PATCH":
            sent.append((path, options["headers"]["Upload-Offset"]))
            if broken_after < len(sent) <= broken_after + 1 + resuming.RECONNECTS:
                raise ProblemError({"code": "unreachable", "detail": "no answer"})
        return real(self, method, path, **options)

    monkeypatch.setattr(Client, "send", breaking)
    assert cli("adapters", "add", adapters[1], "--resume").code != 0
    with Client(remote) as client:
        (upload,) = client.get("/uploads", state="open")["items"]
        assert upload["offset"] == broken_after * 1500
    done = cli("adapters", "add", adapters[1], "--resume")
    assert done.code == 0, done.err
    assert {path for path, _ in sent} == {f"/uploads/{upload['id']}"}
    after = [int(offset) for _, offset in sent[broken_after + 1 + resuming.RECONNECTS :]]
    assert after[0] == broken_after * 1500


def test_a_refusal_is_told(cli: Callable[..., Any], remote: str, tmp_path: Path) -> None:
    pickle = tmp_path / "adapter_model.bin"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    refused = cli("adapters", "add", pickle, "--resume")
    assert refused.code != 0
    assert "pickle" in refused.err
