"""The plugin of vLLM against a stand-in of vLLM's interface and a real service on loopback."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import importlib
import io
import json
import logging
import os
import sys
import threading
import time
import tomllib
import types
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from storage import keys

PLUGIN = Path(__file__).parent.parent.parent / "integrations" / "vllm"
BASE = "acme/tiny-llm"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclass
class LoRARequest:
    """As vllm.lora.request has it: the number must be positive."""

    lora_name: str
    lora_int_id: int
    lora_path: str

    def __post_init__(self) -> None:
        assert self.lora_int_id >= 1
        assert self.lora_path


class LoRAResolver(ABC):
    @abstractmethod
    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None: ...


class LoRAResolverRegistry:
    """As vllm.lora.resolver has it, which is one object with these methods."""

    def __init__(self) -> None:
        self.resolvers: dict[str, LoRAResolver] = {}

    def get_supported_resolvers(self) -> set[str]:
        return set(self.resolvers)

    def register_resolver(self, resolver_name: str, resolver: LoRAResolver) -> None:
        self.resolvers[resolver_name] = resolver

    def get_resolver(self, resolver_name: str) -> LoRAResolver:
        return self.resolvers[resolver_name]


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoRAResolverRegistry]:
    """The modules of vLLM that the plugin imports; gives the registry of resolvers."""
    registry = LoRAResolverRegistry()
    parts: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": LoRARequest},
        "vllm.lora.resolver": {"LoRAResolver": LoRAResolver, "LoRAResolverRegistry": registry},
    }
    for name, contents in parts.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(PLUGIN))
    yield registry
    for name in [name for name in sys.modules if name.partition(".")[0] == "rankwise_vllm"]:
        del sys.modules[name]


@pytest.fixture
def resolver(
    vllm: LoRAResolverRegistry, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., LoRAResolver]:
    """resolver(url, **environment) → the resolver that the plugin's entry point registers."""

    def make(url: str, **environment: str) -> LoRAResolver:
        values = {"RANKWISE_SERVER": url, "RANKWISE_VLLM_CACHE": str(tmp_path / "cache"), **environment}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        entries = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]["entry-points"]
        module, _, function = entries["vllm.general_plugins"]["rankwise_lora_resolver"].partition(":")
        register = getattr(importlib.import_module(module), function)
        register()
        register()  # every process of vLLM calls it, and may do so twice
        (found,) = vllm.resolvers.values()
        return found

    return make


def resolve(resolver: LoRAResolver, name: str, base: str = BASE) -> LoRARequest | None:
    return asyncio.run(resolver.resolve_lora(base, name))


def upload(server: Any, files: Any, **fields: Any) -> str:
    answer = server.upload(files.parts(), fields, headers=fields.pop("headers", None))
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def test_an_adapter_is_loaded_by_id_alias_and_name(
    server: Any, adapter_files: Any, resolver: Any, tmp_path: Path
) -> None:
    files = adapter_files(seed=1)
    adapter = upload(server, files, name="orders, all/of them")
    found = resolver(server.url)
    by_id = resolve(found, adapter)
    assert by_id is not None
    folder = Path(by_id.lora_path)
    assert folder.parent == tmp_path / "cache"
    assert (folder / "adapter_model.safetensors").read_bytes() == files.weights()
    assert sorted(entry.name for entry in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    by_name = resolve(found, "orders, all/of them")
    assert by_name is not None
    assert (by_name.lora_name, by_name.lora_path) == ("orders, all/of them", str(folder))
    for missing in ("orders", "ORDERS, ALL/OF THEM", "adp_" + "0" * 32, "..", "", "x" * 1000, "a\nb"):
        assert resolve(found, missing) is None
    assert server.client.put("/aliases/orders", json={"adapter": adapter}).status_code == 201
    by_alias = resolve(found, "orders")
    assert by_alias is not None
    other = upload(server, adapter_files(seed=2), name="second")
    assert server.client.put("/aliases/orders", json={"adapter": other}).status_code == 200
    moved = resolve(found, "orders")
    assert moved is not None
    assert moved.lora_path != by_alias.lora_path, "another version is another folder"
    assert (folder / "adapter_model.safetensors").read_bytes() == files.weights()
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.name.startswith(".")] == []


def test_what_is_there_is_not_fetched_again(
    server: Any, adapter_files: Any, resolver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = upload(server, adapter_files())
    found = resolver(server.url)
    with ThreadPoolExecutor(4) as pool:
        paths = {answer.lora_path for answer in pool.map(lambda _: resolve(found, adapter), range(4)) if answer}
    assert len(paths) == 1
    registry = importlib.import_module("rankwise_vllm.registry").Registry
    monkeypatch.setattr(registry, "download", lambda *_: pytest.fail("it was fetched again"))
    assert resolve(found, adapter) is not None


def test_what_vllm_would_not_load_is_not_loaded(
    server: Any, adapter_files: Any, resolver: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = resolver(server.url)
    caplog.set_level(logging.INFO)
    biased = upload(server, adapter_files(config={"bias": "lora_only"}), name="biased")
    assert resolve(found, biased) is None
    assert "applies no biases" in caplog.text
    large = upload(server, adapter_files(rank=20, seed=3), name="large")
    assert resolve(found, large) is not None
    assert "--max-lora-rank 32" in caplog.text
    assert resolve(found, large, base="other/model") is None
    assert "for the base model 'acme/tiny-llm', not for 'other/model'" in caplog.text
    for seed in (4, 5):
        upload(server, adapter_files(seed=seed), name="twin")
    assert resolve(found, "twin") is None
    assert "several adapters are called 'twin'" in caplog.text
    factors = {"lora_A.weight": (4, 8), "lora_B.weight": (6, 4)}
    mlx = {f"model.layers.0.self_attn.q_proj.{name}": np.ones(shape, np.float32) for name, shape in factors.items()}
    answer = server.upload([("file", ("x.safetensors", save(mlx)))], {"base_model": BASE})
    if answer.status_code == 201:  # no configuration: whatever it is stored as, it is none of PEFT's directories
        assert resolve(found, answer.json()["id"]) is None


def test_the_base_model_may_have_another_name_here(server: Any, adapter_files: Any, resolver: Any) -> None:
    adapter = upload(server, adapter_files())
    found = resolver(server.url, RANKWISE_VLLM_BASE_MODEL=BASE)
    assert resolve(found, adapter, base="/models/tiny") is not None


def test_the_key_is_sent_and_never_logged(
    serve: Any, adapter_files: Any, resolver: Any, caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(api_keys=True)
    secrets = {}
    with server.services.database.write() as session:
        for scope in ("write", "read"):
            secrets[scope] = keys.create_key(session, scope, [scope])[1]
    headers = {"Authorization": f"Bearer {secrets['write']}"}
    made = server.upload(adapter_files().parts(), headers=headers)
    caplog.set_level(logging.DEBUG)
    found = resolver(server.url, RANKWISE_API_KEY=secrets["read"])
    assert resolve(found, made.json()["id"]) is not None
    settings = importlib.import_module("rankwise_vllm.settings").Settings
    assert "rw_" not in repr(settings.of({"RANKWISE_SERVER": server.url, "RANKWISE_API_KEY": "rw_secret"}))
    with server.services.database.write() as session:
        for row in keys.list_keys(session):
            keys.revoke_key(session, row.id)
    assert resolve(found, made.json()["id"]) is None
    assert "answered 401" in caplog.text
    assert not [secret for secret in secrets.values() if secret in caplog.text]


class Liar(HTTPServer):
    """Answers in place of a service: `zip_bytes` for the download, `location` as a redirect of everything, and first
    of all `answers`, by the beginning of the path."""

    files: list[dict[str, Any]]
    zip_bytes = b""
    location = ""
    asked: list[str]
    answers: dict[str, bytes]

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), LiarHandler)
        self.files, self.asked, self.answers = [], [], {}
        self.thread = threading.Thread(target=self.serve_forever, daemon=True)
        self.thread.start()


class LiarHandler(BaseHTTPRequestHandler):
    server: Liar

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        if self.server.location:
            self.send_response(307)
            self.send_header("Location", self.server.location)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = self.server.zip_bytes
        given = [answer for begin, answer in self.server.answers.items() if self.path.startswith(begin)]
        if given:
            body = given[0]
        elif "/compatibility" in self.path:
            body = b'{"loads": true, "findings": []}'
        elif "/download" not in self.path:
            body = json.dumps({"id": "adp_" + "1" * 32, "base_model": BASE, "files": self.server.files}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing on the terminal."""


@pytest.fixture
def liar() -> Iterator[Liar]:
    server = Liar()
    yield server
    server.shutdown()
    server.thread.join()
    server.server_close()


def zipped(files: dict[str, bytes], packed: int = zipfile.ZIP_STORED) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", packed) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return target.getvalue()


def broken_stream() -> bytes:
    """A zip whose directory is right and whose first member is no stream of deflate."""
    content = bytearray(zipped({WEIGHTS: b"right" * 50, CONFIG: b"{}"}, zipfile.ZIP_DEFLATED))
    first = 30 + len(WEIGHTS)  # behind the local header
    content[first : first + 4] = b"\xff" * 4
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zipped({WEIGHTS: b"other", CONFIG: b"{}"}), "came with the SHA-256"),
        (zipped({CONFIG: b"{}"}), "has no adapter_model.safetensors"),
        (zipped({WEIGHTS: b"right"}), "has no adapter_config.json"),
        (zipped({WEIGHTS: b"right", CONFIG: b"{}", "../evil": b""}), "has a file called '../evil'"),
        (zipped({WEIGHTS: b"right", CONFIG: b"{}", "/evil": b""}), "has a file called '/evil'"),
        (zipped({WEIGHTS: b"right", CONFIG: bytes(2 << 20)}), "more bytes came"),
        (
            # each of them alone would fit, and the archive is small
            zipped({WEIGHTS: b"right", CONFIG: bytes(600_000), "README.md": bytes(600_000)}, zipfile.ZIP_DEFLATED),
            "more bytes came",
        ),
        (zipped({WEIGHTS: b"right", CONFIG: b"{}"}, zipfile.ZIP_LZMA), "is packed in a way"),
        (broken_stream(), "is no zip"),
        (b"no zip at all", "is no zip"),
    ],
)
def test_a_download_that_is_not_what_was_announced_leaves_nothing(
    liar: Liar, resolver: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, words: str
) -> None:
    caplog.set_level(logging.INFO)
    digest = hashlib.sha256(b"right").hexdigest()
    liar.files = [{"path": "adapter_model.safetensors", "sha256": digest, "size": 5}]
    liar.zip_bytes = content
    assert resolve(resolver(f"http://127.0.0.1:{liar.server_port}"), "adp_" + "1" * 32) is None
    assert words in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


ID = "adp_" + "1" * 32
ADAPTER: dict[str, Any] = {"id": ID, "base_model": BASE, "files": []}


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        (f"/adapters/{ID}", []),
        (f"/adapters/{ID}", {}),
        (f"/adapters/{ID}", {**ADAPTER, "id": 1}),
        (f"/adapters/{ID}", {**ADAPTER, "id": "../../x"}),
        (f"/adapters/{ID}", {**ADAPTER, "base_model": {}}),
        (f"/adapters/{ID}", {**ADAPTER, "files": None}),
        (f"/adapters/{ID}", {**ADAPTER, "files": [{"path": WEIGHTS}]}),
        (f"/adapters/{ID}", {**ADAPTER, "files": [{"path": WEIGHTS, "sha256": "x", "size": 1}]}),
        (f"/adapters/{ID}", {**ADAPTER, "files": [{"path": WEIGHTS, "sha256": "0" * 64, "size": -1}]}),
        (f"/adapters/{ID}/compatibility", {"loads": True}),
        (f"/adapters/{ID}/compatibility", {"loads": True, "findings": ["x"]}),
        ("/aliases/orders", {"name": "orders"}),
        ("/aliases/orders", {"adapter": "../keys"}),
        ("/adapters?", {"items": [{"id": ID}], "next": None}),
        ("/adapters?", {"items": [], "next": 7}),
        ("/adapters?", "deep"),
    ],
)
def test_json_of_another_shape_is_an_answer_of_something_else(
    liar: Liar, resolver: Any, caplog: pytest.LogCaptureFixture, path: str, answer: Any
) -> None:
    caplog.set_level(logging.INFO)
    liar.answers[path] = b"[" * 200_000 if answer == "deep" else json.dumps(answer).encode()
    registry = f"http://127.0.0.1:{liar.server_port}"
    if path == "/adapters?":
        registry_of = importlib.import_module("rankwise_vllm.registry").Registry
        found = resolver(registry)
        with pytest.raises(importlib.import_module("rankwise_vllm.registry").RegistryError, match="as Rankwise does"):
            registry_of(registry)._named("orders")
        return
    found = resolver(registry)
    assert resolve(found, "orders" if path.startswith("/aliases") else ID) is None
    assert "did not answer as Rankwise does" in caplog.text


def test_a_name_in_very_many_names_is_not_searched_for_without_end(liar: Liar, resolver: Any) -> None:
    resolver(f"http://127.0.0.1:{liar.server_port}")
    module = importlib.import_module("rankwise_vllm.registry")
    page = {"items": [{"id": ID, "name": "a longer one"}], "next": "more"}
    liar.answers["/adapters?"] = json.dumps(page).encode()
    with pytest.raises(module.AmbiguousNameError, match="more than 1000 adapters have 'a' in their names"):
        module.Registry(f"http://127.0.0.1:{liar.server_port}")._named("a")
    assert len(liar.asked) == 5


def test_a_full_disk_is_not_told_as_a_silent_service(
    server: Any, adapter_files: Any, resolver: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    adapter = upload(server, adapter_files())
    found = resolver(server.url)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(importlib.import_module("rankwise_vllm.cache"), "_copy", full)
    assert resolve(found, adapter) is None
    assert "No space left on device" in caplog.text
    assert "no answer from" not in caplog.text


def test_what_a_killed_process_left_is_removed_a_day_later(
    server: Any, adapter_files: Any, resolver: Any, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    for name, age in ((".fetch-old", 2), (".fetch-new", 0.5), ("kept", 9)):
        (cache / name).mkdir(parents=True)
        (cache / name / WEIGHTS).write_bytes(b"half")
        then = time.time() - age * 24 * 60 * 60
        os.utime(cache / name, (then, then))
    found = resolve(resolver(server.url), upload(server, adapter_files()))
    assert found is not None
    names = {folder.name for folder in cache.iterdir()}
    assert names == {".fetch-new", "kept", Path(found.lora_path).name}


def test_no_redirect_is_followed_and_an_absent_service_is_no_crash(
    liar: Liar, resolver: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    liar.location = f"http://127.0.0.1:{liar.server_port}/elsewhere"
    found = resolver(f"http://127.0.0.1:{liar.server_port}", RANKWISE_API_KEY="rw_secret")
    assert resolve(found, "adp_" + "1" * 32) is None
    assert liar.asked == ["/adapters/adp_" + "1" * 32]
    assert "answered 307" in caplog.text
    registry = importlib.import_module("rankwise_vllm.registry").Registry("http://127.0.0.1:9", "rw_secret")
    with pytest.raises(importlib.import_module("rankwise_vllm.registry").RegistryError, match=r"no answer.*:9: "):
        registry.find("anything")


def test_without_a_server_nothing_is_registered(vllm: LoRAResolverRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKWISE_SERVER", raising=False)
    plugin = importlib.import_module("rankwise_vllm")
    plugin.register()
    assert vllm.resolvers == {}
    for wrong in ("ftp://x", "rankwise.example", "https://user@x", "http://"):
        monkeypatch.setenv("RANKWISE_SERVER", wrong)
        with pytest.raises(ValueError, match="RANKWISE_SERVER must be"):
            plugin.register()
