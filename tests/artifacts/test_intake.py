from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from artifacts import intake, upload
from artifacts.errors import (
    ArchiveRefused,
    ConfigRefused,
    DiskFull,
    FileBroken,
    FormatUnknown,
    PickleRefused,
    RankwiseError,
    TooLarge,
)
from artifacts.intake import IntakeLimits, inspect, media_type, receive
from artifacts.layout import CONFIG_NAME, METADATA_KEY, WEIGHTS_NAME
from artifacts.manifest import AdapterManifest

Make = Callable[..., Any]
CHECKPOINT = {
    "optimizer.pt": b"PK\3\4archive/data.pkl never opened",
    "scheduler.pt": pickle.dumps({}),
    "rng_state.pth": b"PK\3\4 not even an archive",
    "training_args.bin": b"\x80\4never opened",
    "trainer_state.json": b"{}",
    "runs/events.out.tfevents.1": b"log",
}


@pytest.fixture
def files(tmp_path: Path, write_tensors: Make, pairs: Make, lora_config: Make) -> dict[str, bytes]:
    """A good PEFT adapter: file name → content."""
    weights = write_tensors(tmp_path / "source", pairs("m.q_proj"), {"format": "pt"})
    config = json.dumps(lora_config(target_modules=["q_proj"])).encode()
    content = {WEIGHTS_NAME: weights.read_bytes(), CONFIG_NAME: config}
    weights.unlink()
    return content


@pytest.fixture
def take_in(tmp_path: Path) -> Callable[..., AdapterManifest]:
    """Stage files as an upload does, receive and inspect them. A refusal must leave nothing behind."""

    def run(sent: dict[str, bytes], limits: IntakeLimits | None = None, **options: Any) -> AdapterManifest:
        staging, workdir = tmp_path / "staging", tmp_path / "work"
        staging.mkdir()
        staged = []
        for number, (name, content) in enumerate(sent.items()):
            path = staging / str(number)
            path.write_bytes(content)
            staged.append((name, path))
        try:
            directory = receive(staged, workdir, limits or IntakeLimits())
        except RankwiseError:
            assert not workdir.exists() or list(workdir.iterdir()) == []
            raise
        finally:
            assert [path.read_bytes() for _, path in staged] == list(sent.values())
            assert {entry.name for entry in tmp_path.iterdir()} <= {"staging", "work"}
        assert not (workdir / "unpacked").exists()
        return inspect(directory, **options)

    return run


TakeIn = Callable[..., AdapterManifest]


def zipped(content: dict[str, bytes], folder: str = "") -> dict[str, bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in content.items():
            archive.writestr(folder + name, data)
    return {"upload.zip": buffer.getvalue()}


def tarred(content: dict[str, bytes], folder: str = "") -> dict[str, bytes]:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return {"upload.tar.gz": buffer.getvalue()}


def dropped(manifest: AdapterManifest) -> dict[str, str]:
    return {entry.key: entry.reason for entry in manifest.report.dropped_files}


def test_files_of_a_peft_directory(take_in: TakeIn, files: dict[str, bytes]) -> None:
    manifest = take_in(files)
    assert (manifest.format, manifest.method, manifest.rank, manifest.alpha) == ("peft", "lora", 4, 8.0)
    assert (manifest.base_model, manifest.target_modules, manifest.dtype) == ("someone/base", ("q_proj",), "F32")
    assert (manifest.parameter_count, manifest.mergeable, manifest.refusal) == (4 * 8 + 6 * 4, True, None)
    assert [entry.path for entry in manifest.files] == [CONFIG_NAME, WEIGHTS_NAME]
    assert [entry.size for entry in manifest.files] == [len(files[CONFIG_NAME]), len(files[WEIGHTS_NAME])]
    assert (manifest.report.used_keys, manifest.report.warnings, dropped(manifest)) == (2, (), {})
    assert manifest.config["r"] == 4


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("folder", ["", "my adapter/", "./x/"])
def test_archives_with_and_without_a_top_folder(
    take_in: TakeIn, files: dict[str, bytes], pack: Callable[..., dict[str, bytes]], folder: str
) -> None:
    manifest = take_in(pack(files | {"README.md": b"# card"}, folder))
    assert [entry.path for entry in manifest.files] == ["README.md", CONFIG_NAME, WEIGHTS_NAME]


def test_the_same_adapter_in_other_wrappings_has_one_identity(
    tmp_path: Path, take_in: TakeIn, files: dict[str, bytes]
) -> None:
    first = take_in(zipped(files | {"README.md": b"# card"}))
    directory = receive(
        [(name, _staged(tmp_path, name, data)) for name, data in files.items()], tmp_path / "w2", IntakeLimits()
    )
    assert inspect(directory).identity_digest == first.identity_digest


def _staged(tmp_path: Path, name: str, data: bytes) -> Path:
    path = tmp_path / f"staged-{name}"
    path.write_bytes(data)
    return path


def test_single_safetensors_with_its_configuration_inside(
    tmp_path: Path, take_in: TakeIn, write_tensors: Make, pairs: Make, lora_config: Make
) -> None:
    path = write_tensors(tmp_path / "x", pairs("m.q_proj"), {METADATA_KEY: json.dumps(lora_config())})
    content = path.read_bytes()
    path.unlink()
    manifest = take_in({"whatever the client says.dat": content})
    assert manifest.format == "safetensors-metadata"
    assert [entry.path for entry in manifest.files] == [WEIGHTS_NAME]


def test_inspect_takes_a_single_file_too(tmp_path: Path, write_tensors: Make, pairs: Make, lora_config: Make) -> None:
    path = write_tensors(tmp_path / "x.safetensors", pairs("m.q_proj"), {METADATA_KEY: json.dumps(lora_config())})
    assert [entry.path for entry in inspect(path).files] == ["x.safetensors"]


def test_single_safetensors_without_configuration(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(ConfigRefused, match=r"adapter_config\.json is missing"):
        take_in({WEIGHTS_NAME: files[WEIGHTS_NAME]})


def test_zip_without_configuration(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(ConfigRefused, match=r"adapter_config\.json is missing"):
        take_in(zipped({WEIGHTS_NAME: files[WEIGHTS_NAME]}))


def test_configuration_without_weights(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(FormatUnknown):
        take_in({CONFIG_NAME: files[CONFIG_NAME]})


def test_weights_of_another_name_get_ours(take_in: TakeIn, files: dict[str, bytes]) -> None:
    manifest = take_in({"mine.safetensors": files[WEIGHTS_NAME], CONFIG_NAME: files[CONFIG_NAME]})
    assert [entry.path for entry in manifest.files] == [CONFIG_NAME, WEIGHTS_NAME]


@pytest.mark.parametrize("pack", [dict, zipped, tarred])
def test_leftovers_of_training_are_dropped_and_listed(
    take_in: TakeIn, files: dict[str, bytes], pack: Callable[..., dict[str, bytes]]
) -> None:
    manifest = take_in(pack(files | CHECKPOINT | {"tokenizer.json": b"{}"}))
    assert [entry.path for entry in manifest.files] == [CONFIG_NAME, WEIGHTS_NAME, "tokenizer.json"]
    assert dropped(manifest).keys() == CHECKPOINT.keys()
    assert dropped(manifest)["optimizer.pt"] == "a pickle; never opened"
    assert dropped(manifest)["trainer_state.json"] == "not part of an adapter"


def test_names_of_the_client_lead_nowhere(take_in: TakeIn, files: dict[str, bytes]) -> None:
    manifest = take_in(
        {
            "../../../etc/adapter_model.safetensors": files[WEIGHTS_NAME],
            "/etc/adapter_config.json": files[CONFIG_NAME],
            "C:\\etc\\..\\evil\n.exe": b"x",
        }
    )
    assert [entry.path for entry in manifest.files] == [CONFIG_NAME, WEIGHTS_NAME]
    assert list(dropped(manifest)) == ["C:/etc/evil?.exe"]


def test_files_that_a_mac_adds_are_dropped(take_in: TakeIn, files: dict[str, bytes]) -> None:
    extra = {"__MACOSX/._adapter_model.safetensors": b"x", "._adapter_config.json": b"x"}
    assert dropped(take_in(zipped(files | extra))).keys() == extra.keys()


def test_adapters_of_earlier_steps_are_named(take_in: TakeIn, files: dict[str, bytes]) -> None:
    older = {f"checkpoint-500/{name}": data for name, data in files.items()}
    manifest = take_in(zipped(files | older))
    assert dropped(manifest) == dict.fromkeys(older, "in another folder than the adapter")


def test_several_adapters_in_one_archive(take_in: TakeIn, files: dict[str, bytes]) -> None:
    both = {f"{folder}/{name}": data for folder in ("policy", "reference") for name, data in files.items()}
    with pytest.raises(ArchiveRefused, match="Several adapters are in the upload, in policy, reference"):
        take_in(zipped(both))


def test_several_weights_in_one_folder(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(FormatUnknown, match="Several files of weights"):
        take_in({"a.safetensors": b"", "b.safetensors": b"", CONFIG_NAME: files[CONFIG_NAME]})


@pytest.mark.parametrize("pack", [dict, zipped])
@pytest.mark.parametrize("count", [1, 2])
def test_weights_that_are_cut_into_several_files(
    take_in: TakeIn, files: dict[str, bytes], count: int, pack: Callable[..., dict[str, bytes]]
) -> None:
    shards = {f"adapter_model-0000{number}-of-00002.safetensors": files[WEIGHTS_NAME] for number in range(1, count + 1)}
    with pytest.raises(FormatUnknown, match=f"cut into several files, of which {count} came"):
        take_in(pack(shards | {CONFIG_NAME: files[CONFIG_NAME]}))


def test_a_part_of_the_weights_alone(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(FormatUnknown, match="cut into several files"):
        take_in({"lora-00002-of-00003.safetensors": files[WEIGHTS_NAME]})


def test_weights_in_one_part_are_whole(take_in: TakeIn, files: dict[str, bytes]) -> None:
    one = {"adapter_model-00001-of-00001.safetensors": files[WEIGHTS_NAME], CONFIG_NAME: files[CONFIG_NAME]}
    assert take_in(one | {"other-000010.bin": b""}).mergeable


def test_other_weights_beside_those_that_are_taken_are_named(take_in: TakeIn, files: dict[str, bytes]) -> None:
    manifest = take_in(files | {"pytorch_lora_weights.safetensors": files[WEIGHTS_NAME]})
    assert dropped(manifest)["pytorch_lora_weights.safetensors"].startswith("other weights than adapter_model")


def test_two_files_of_one_name(tmp_path: Path, files: dict[str, bytes]) -> None:
    path = _staged(tmp_path, WEIGHTS_NAME, files[WEIGHTS_NAME])
    with pytest.raises(FileBroken, match="same name"):
        receive([(WEIGHTS_NAME, path), (WEIGHTS_NAME, path)], tmp_path / "work", IntakeLimits())


def torch_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("adapter_model/data.pkl", b"\x80\2}q\0.")
        archive.writestr("adapter_model/data/0", bytes(64))
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.pth", "x.ckpt", "x.safetensors", "x"])
@pytest.mark.parametrize("content", [torch_zip(), pickle.dumps({"a": 1}), pickle.dumps({"a": 1}, protocol=2)])
def test_pickle_sent_alone(take_in: TakeIn, name: str, content: bytes) -> None:
    with pytest.raises(PickleRefused):
        take_in({name: content})


@pytest.mark.parametrize("name", ["adapter_model.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl"])
def test_file_with_a_name_of_pickles(take_in: TakeIn, name: str) -> None:
    with pytest.raises(PickleRefused):
        take_in({name: b"anything else"})


@pytest.mark.parametrize("pack", [dict, zipped, tarred])
@pytest.mark.parametrize("others", [(), ("lit_config.json", "hyperparameters.yaml")])
def test_pickles_of_litgpt_are_refused_by_name(
    take_in: TakeIn, pack: Callable[..., dict[str, bytes]], others: tuple[str, ...]
) -> None:
    with pytest.raises(PickleRefused):
        take_in(pack({"lit_model.pth.lora": torch_zip(), **dict.fromkeys(others, b"{}")}))


@pytest.mark.parametrize("pack", [dict, zipped, tarred])
@pytest.mark.parametrize("content", [torch_zip(), pickle.dumps({"a": 1})])
def test_pickled_weights_with_a_configuration(
    take_in: TakeIn, files: dict[str, bytes], pack: Callable[..., dict[str, bytes]], content: bytes
) -> None:
    with pytest.raises(PickleRefused, match=r"adapter_model\.bin"):
        take_in(pack({"adapter_model.bin": content, CONFIG_NAME: files[CONFIG_NAME]}))


def test_pickle_that_calls_itself_safetensors(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(PickleRefused):
        take_in({WEIGHTS_NAME: torch_zip(), CONFIG_NAME: files[CONFIG_NAME]})


def test_legacy_pickle_that_calls_itself_safetensors(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(PickleRefused):
        take_in({WEIGHTS_NAME: pickle.dumps({"a": [1]}), CONFIG_NAME: files[CONFIG_NAME]})


def test_pickle_beside_safetensors_is_only_dropped(take_in: TakeIn, files: dict[str, bytes]) -> None:
    manifest = take_in(files | {"adapter_model.bin": torch_zip()})
    assert dropped(manifest) == {"adapter_model.bin": "a pickle; never opened"}


def test_nested_archive(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(ArchiveRefused, match="archive inside the archive"):
        take_in(zipped(zipped(files)))


def test_archive_among_several_files(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(ArchiveRefused, match="among several files"):
        take_in({WEIGHTS_NAME: zipped(files)["upload.zip"], CONFIG_NAME: files[CONFIG_NAME]})


@pytest.mark.parametrize("content", [b"", b"hello", b"{}", bytes(100)])
def test_what_is_nothing_at_all(take_in: TakeIn, content: bytes) -> None:
    with pytest.raises(FormatUnknown, match="neither a safetensors nor"):
        take_in({"file": content})


def test_empty_safetensors(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(FileBroken, match="truncated"):
        take_in({WEIGHTS_NAME: b"", CONFIG_NAME: files[CONFIG_NAME]})


def test_shards_of_a_distributed_checkpoint(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(FormatUnknown, match="distributed checkpoint"):
        take_in({"model/__0_0.distcp": b"x", CONFIG_NAME: files[CONFIG_NAME]})


def test_no_file_and_too_many(tmp_path: Path) -> None:
    with pytest.raises(FormatUnknown, match="No file"):
        receive([], tmp_path / "a", IntakeLimits())
    path = _staged(tmp_path, "x", b"x")
    with pytest.raises(TooLarge, match="201 files"):
        receive([(str(number), path) for number in range(201)], tmp_path / "b", IntakeLimits())


def test_more_bytes_than_allowed(take_in: TakeIn, files: dict[str, bytes]) -> None:
    with pytest.raises(TooLarge):
        take_in(files, IntakeLimits(max_bytes=100))


def test_companion_that_is_too_large(take_in: TakeIn, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "_MAX_COMPANION_BYTES", 500)
    with pytest.raises(TooLarge, match=r"README\.md"):
        take_in(files | {"README.md": b"x" * 501})


def test_rank_that_is_not_the_configurations(take_in: TakeIn, files: dict[str, bytes], lora_config: Make) -> None:
    with pytest.raises(FileBroken, match=r"rank 4, adapter_config\.json says 16"):
        take_in(files | {CONFIG_NAME: json.dumps(lora_config(r=16)).encode()})


def test_alpha_of_zero(take_in: TakeIn, files: dict[str, bytes], lora_config: Make) -> None:
    with pytest.raises(ConfigRefused, match="lora_alpha"):
        take_in(files | {CONFIG_NAME: json.dumps(lora_config(lora_alpha=0)).encode()})


def test_nan_is_accepted_and_reported(peft_directory: Make, pairs: Make) -> None:
    key = "base_model.model.m.q_proj.lora_A.weight"
    manifest = inspect(
        peft_directory(pairs("m.q_proj", d_in=1, dtype="BF16"), data={key: b"\xc0\x7f\x80\x7f" + bytes(4)})
    )
    assert manifest.mergeable
    assert manifest.report.nonfinite == {key: 2}
    assert "2 elements of 1 tensors are NaN or Inf" in manifest.report.warnings[-1]


def test_adapter_without_effect_is_reported(peft_directory: Make, pairs: Make) -> None:
    tensors = pairs("m.q_proj", "m.v_proj")
    zero = {key: bytes(6 * 4 * 4) for key in tensors if "lora_B" in key}
    everywhere = inspect(peft_directory(tensors, data=zero, name="all"))
    zero.popitem()
    partly = inspect(peft_directory(tensors, data=zero, name="one"))
    assert "zero in every module" in everywhere.report.warnings[-1]
    assert "zero in 1 of 2 modules, for instance 'm.q_proj'" in partly.report.warnings[-1]


def test_dora_is_stored_with_the_reason_why_it_is_not_merged(peft_directory: Make, pairs: Make) -> None:
    tensors = pairs("m.q_proj") | {"base_model.model.m.q_proj.lora_magnitude_vector": ("F32", [6])}
    manifest = inspect(peft_directory(tensors, use_dora=True))
    assert (manifest.method, manifest.mergeable) == ("dora", False)
    assert manifest.refusal is not None
    assert manifest.refusal.startswith("use_dora is set: DoRA rescales")
    assert manifest.report.used_keys == 3


def test_vllm_embedding_rows_are_kept_and_keep_from_merging(take_in: TakeIn, files: dict[str, bytes]) -> None:
    manifest = take_in(files | {"new_embeddings.safetensors": b"x"})
    assert "new_embeddings.safetensors" in [entry.path for entry in manifest.files]
    assert manifest.refusal == "new_embeddings.safetensors holds embedding rows besides the factors"


def test_the_uploader_knows_the_base_better(peft_directory: Make, pairs: Make) -> None:
    directory = peft_directory(pairs("m.q_proj"), revision="abc")
    assert (inspect(directory).base_model, inspect(directory).base_model_revision) == ("someone/base", "abc")
    named = inspect(directory, base_model="other/base")
    assert (named.base_model, named.base_model_revision) == ("other/base", None)
    assert inspect(directory, base_model="someone/base").base_model_revision == "abc"


def test_mixed_ranks_and_dtypes(peft_directory: Make, pairs: Make) -> None:
    tensors = pairs("m.q_proj", rank=2, dtype="F16") | pairs("m.v_proj", rank=16, dtype="BF16")
    manifest = inspect(peft_directory(tensors, r=2, rank_pattern={"v_proj": 16}))
    assert (manifest.rank, manifest.dtype, manifest.alpha) == (16, "BF16", 8.0)


def test_long_lists_of_warnings_are_cut(peft_directory: Make, pairs: Make) -> None:
    tensors = pairs("m.q_proj") | {f"strange.{number}": ("F32", [1]) for number in range(200)}
    report = inspect(peft_directory(tensors)).report
    assert len(report.ignored) == 200
    assert report.warnings[-1].endswith("more warnings.")
    assert len(report.warnings) == intake.MAX_WARNINGS + 1


def test_other_files_of_a_directory_are_not_the_adapters(peft_directory: Make, pairs: Make) -> None:
    directory = peft_directory(pairs("m.q_proj"))
    (directory / "optimizer.pt").write_bytes(b"x")
    assert [entry.path for entry in inspect(directory).files] == [CONFIG_NAME, WEIGHTS_NAME]


def test_disk_full(take_in: TakeIn, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.link", no_space)
    with pytest.raises(DiskFull):
        take_in(files)


def test_another_file_system_means_a_copy(
    take_in: TakeIn, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_device(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr("os.link", other_device)
    assert take_in(files).rank == 4


def test_files_that_were_hashed_on_their_way_are_not_hashed_again(
    tmp_path: Path, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    staged = [(name, _staged(tmp_path, name, data)) for name, data in files.items()]
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for _, path in staged}
    known = receive(staged, tmp_path / "known", IntakeLimits(), digests=digests)
    computed = inspect(receive(staged, tmp_path / "computed", IntakeLimits()))
    monkeypatch.setattr(intake, "file_sha256", None)
    assert inspect(known) == computed
    assert [entry.sha256 for entry in computed.files] == [digests[path] for _, path in reversed(staged)]


def test_media_types() -> None:
    assert media_type("a.safetensors") == "application/vnd.safetensors"
    assert media_type("a.json") == "application/json"
    assert media_type("LICENSE") == "application/octet-stream"


def test_the_state_of_a_training_lies_beside_its_adapter(tmp_path: Path, write_tensors: Callable[..., Path]) -> None:
    stem = "lora_unet_down_blocks_0_attentions_0_proj_in"
    shapes = {f"{stem}.lora_down.weight": ("F32", [4, 320, 1, 1]), f"{stem}.lora_up.weight": ("F32", [320, 4, 1, 1])}
    weights = write_tensors(tmp_path / "weights", shapes)
    (other := tmp_path / "other").write_bytes(b"{}")
    state = [("model.safetensors", write_tensors(tmp_path / "model", shapes))]
    state += [(name, other) for name in ("optimizer.bin", "train_state.json", "sampler.bin")]
    directory = receive([("last.safetensors", weights), *state], tmp_path / "both", IntakeLimits())
    manifest = inspect(directory)
    assert manifest.format == "kohya"
    assert dropped(manifest).keys() == {name for name, _ in state}
    assert dropped(manifest)["model.safetensors"] == "the state of a training, beside what was saved of it"
    alone = inspect(receive(state, tmp_path / "state", IntakeLimits()))  # the folder from which a training goes on
    assert alone.weights_digest == manifest.weights_digest
    with pytest.raises(FormatUnknown, match="Several files of weights"):
        receive([("last.safetensors", weights), state[0]], tmp_path / "neither", IntakeLimits())
