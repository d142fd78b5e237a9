"""The job kinds "compose" and "compare", run by this process: what stays warm, is published, or ends an attempt."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "compose"))

from artifacts import intake
from artifacts.base_model import inspect_base
from artifacts.errors import (
    AttemptCancelled,
    AttemptStale,
    ComposeRefused,
    CompositionDiverged,
    ImageFlagged,
    NotFound,
    RequestInvalid,
)
from artifacts.intake import IntakeLimits
from artifacts.labels import labels_of
from storage import adapters, claims, images, jobs, models, previews
from storage.blobs import BlobStore
from workers.attempt import AttemptSpec
from workers.context import Interruption, JobContext
from workers.jobs import compare, compose
from workers.publishing import publish
from workers.warm_models import WarmModels

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline in `base`, LoRAs in `first`, `second` and, in PEFT's layout, `peft` and `louder`."""
    import diffusers
    from toy_pipelines import write_diffusers_lora, write_peft_lora, write_sd

    folder = tmp_path_factory.mktemp("toys")
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(write_sd(folder / "base"), safety_checker=None)
    write_diffusers_lora(folder / "first", pipeline, 1)
    write_diffusers_lora(folder / "second", pipeline, 2)
    config = write_peft_lora(folder / "peft", pipeline, 3) / "adapter_config.json"
    shutil.copytree(folder / "peft", folder / "louder")
    louder = json.loads(config.read_text()) | {"lora_alpha": 12}
    (folder / "louder" / "adapter_config.json").write_text(json.dumps(louder))
    return folder


class Bench:
    """Stores what jobs need, and gives attempts of this process, which share what is warm."""

    def __init__(self, pool: Any, toys: Path) -> None:
        self.pool, self.toys = pool, toys
        self.blobs = BlobStore(pool.settings().blob_url)
        self.warm = WarmModels()
        self.interruption = Interruption()
        self.ids = {name: self._adapter(name) for name in ("first", "second", "peft", "louder")}
        with pool.database.write() as session:
            self.base = models.add_model(session, inspect_base(toys / "base"))[0].id

    def _adapter(self, name: str) -> str:
        work = self.pool.folder / "intake" / name
        work.mkdir(parents=True)
        sources = list((self.toys / name).iterdir())
        staged = [(file.name, Path(shutil.copy(file, work / file.name))) for file in sources]
        directory = intake.receive(staged, work, IntakeLimits())
        manifest = intake.inspect(directory)
        for entry in manifest.files:
            self.blobs.put_file(directory / entry.path, entry.sha256)
        with self.pool.database.write() as session:
            return adapters.add_adapter(session, manifest, name=name)[0].id

    def params(self, *concepts: str, **changes: Any) -> dict[str, Any]:
        words = (("sks", "circle"), ("zwx", "square"))
        names = concepts or ("first", "second")
        return {
            "base_model": self.base,
            "concepts": [
                {"adapter": self.ids[name], "trigger": trigger, "noun": noun, "weight": 1.0}
                for name, (trigger, noun) in zip(names, words, strict=False)
            ],
            "prompt": " and ".join(f"a {noun}" for _, noun in words[: len(names)]),
            "method": "clora_mask_only" if len(names) > 1 else "merge",
            "seed": 3,
            "steps": 2,
            "width": 32,
            "height": 32,
            **changes,
        }

    def attempt(self, params: dict[str, Any], kind: str = "compose", **resources: Any) -> JobContext:
        job_id = self.pool.submit(kind, **params)
        with self.pool.database.write() as session:
            assert claims.claim_next(session, server_id="s", boot_id="b", slot="cpu:0", lease_seconds=600) is not None
        settings = self.pool.settings()
        scratch = self.pool.folder / "scratch" / job_id
        scratch.mkdir(parents=True)
        spec = AttemptSpec(
            job_id=job_id,
            attempt=1,
            kind=kind,
            params=params,
            slot="cpu:0",
            device="cpu",
            database_url=settings.database_url,
            blob_url=settings.blob_url,
            scratch=str(scratch),
            cache=str(self.pool.folder / "cache"),
            model_roots=(str(self.toys),),
            function="",
            warm_bytes=10**9,
            resources=resources,
        )
        return JobContext(spec, self.pool.database, self.blobs, self.interruption, self.warm)

    def png(self, params: dict[str, Any]) -> bytes:
        """The image that a job of these parameters makes."""
        outcome = compose.run(self.attempt(params))
        return outcome.images[0].files[0].path.read_bytes()


@pytest.fixture
def bench(pool: Any, toys: Path) -> Bench:
    return Bench(pool, toys)


def test_an_image_is_published_with_its_files_in_one_go(bench: Bench) -> None:
    context = bench.attempt(bench.params(preview_every=1))
    outcome = compose.run(context)
    with bench.pool.database.read() as session:
        assert previews.get_preview(session, context.spec.job_id).data.startswith(b"\xff\xd8")
        assert images.list_images(session).items == ()
    result = publish(context, outcome)
    with bench.pool.database.read() as session:
        row = images.get_image(session, result["images"][0])
        assert (row.label, row.method, row.model_id) == ("clora_mask_only", "clora_mask_only", bench.base)
        assert {file.role for file in row.files} == {"image", "mask", "picture"}
        assert all(bench.blobs.exists(file.sha256) for file in row.files)
        assert row.report == result["report"]
        levels = [item["level"] for item in row.report["compatibility"].values()]
        assert levels == ["shape", "shape"], "the adapters name no base model"
        job = jobs.get_job(session, context.spec.job_id)
        assert (job.state, job.result) == ("succeeded", result)
        with pytest.raises(NotFound):
            previews.get_preview(session, context.spec.job_id)


def test_an_attempt_that_was_overtaken_publishes_no_image(bench: Bench) -> None:
    context = bench.attempt(bench.params("first"))
    outcome = compose.run(context)
    with bench.pool.database.write() as session:
        error = {"code": "x", "detail": "y"}
        claims.requeue(session, context.spec.job_id, 1, delay_seconds=0, error=error, exit=None)
    with pytest.raises(AttemptStale):
        publish(context, outcome)
    with bench.pool.database.read() as session:
        assert images.list_images(session).items == ()


def test_pipeline_and_adapters_stay_warm_and_the_image_is_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compose import pipelines

    loads: list[str] = []
    real = pipelines.read_adapter
    monkeypatch.setattr(pipelines, "read_adapter", lambda *args: loads.append(args[2]) or real(*args))  # type: ignore[func-returns-value]
    cold = bench.png(bench.params())
    assert bench.warm.ids == (bench.base,)
    warm = bench.png(bench.params())
    assert loads == ["first", "second"]
    assert warm == cold


def test_adapters_that_share_their_weights_and_not_their_alpha_are_two(bench: Bench) -> None:
    quiet, louder = bench.png(bench.params("peft")), bench.png(bench.params("louder"))
    assert quiet != louder
    assert bench.png(bench.params("peft")) == quiet


def test_a_cancelled_job_ends_after_the_step_that_it_is_in_and_leaves_nothing_behind(bench: Bench) -> None:
    before = bench.png(bench.params("first"))
    context = bench.attempt(bench.params("first", steps=50))
    _, loaded = context.pipeline(bench.base, "float32")
    passes = []

    def count(*_: Any) -> None:
        passes.append(1)
        bench.interruption.wanted = len(passes) >= 3

    handle = loaded.unet.register_forward_hook(count)
    with pytest.raises(AttemptCancelled):
        compose.run(context)
    handle.remove()
    assert len(passes) == 3
    bench.interruption.wanted = False
    assert bench.png(bench.params("first")) == before


def test_a_pipeline_of_the_hub_is_had_by_its_name_and_commit(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    import diffusers

    from artifacts.base_model import BaseModelRef

    asked: list[tuple[str, str | None, bool]] = []

    def download(name: str, *, revision: str | None, use_safetensors: bool) -> str:
        asked.append((name, revision, use_safetensors))
        if name == "org/absent":
            raise OSError("there is no such repository")
        return str(bench.toys / "base")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
    with bench.pool.database.write() as session:
        for name in ("org/tiny", "org/absent"):
            models.add_model(session, BaseModelRef(name, "hub", name, "c" * 40))
    assert bench.png(bench.params("first", base_model="org/tiny"))
    assert asked == [("org/tiny", "c" * 40, True)]
    with pytest.raises(ComposeRefused, match="no such repository") as refused:
        bench.png(bench.params("first", base_model="org/absent"))
    assert [item.pointer for item in refused.value.errors] == ["/base_model"]


def test_after_the_devices_memory_ran_out_less_is_used(bench: Bench) -> None:
    params = bench.params(method="clora", parameters={"batch_branches": "auto"})
    report = compose.run(bench.attempt(params, reduce_memory=True)).report
    assert report["parameters"]["batch_branches"] == "never"
    assert report["parameters"]["gradient_caching"] == "always"
    assert not report["batched"]
    compose.run(bench.attempt(bench.params("first"), reduce_memory=True))  # a method without such parameters


@pytest.mark.parametrize(
    ("changes", "error", "pointer"),
    [
        ({"precision": "float16"}, RequestInvalid, "/precision"),
        ({"width": 33}, ComposeRefused, "/width"),
        ({"prompt": "a circle and a square " + "and a " * 9}, ComposeRefused, "/prompt"),
    ],
)
def test_what_only_the_worker_can_see_fails_with_its_place(
    bench: Bench, changes: dict[str, Any], error: type[RequestInvalid], pointer: str
) -> None:
    with pytest.raises(error) as raised:
        compose.run(bench.attempt(bench.params(**changes)))
    assert [item.pointer for item in raised.value.errors] == [pointer]


def test_a_latent_that_becomes_nan_names_the_step(bench: Bench) -> None:
    context = bench.attempt(bench.params("first", steps=5))
    _, loaded = context.pipeline(bench.base, "float32")
    passes = []

    def spoil(_module: Any, _args: Any, output: Any) -> Any:
        passes.append(1)
        return (output[0] * float("nan"),) if len(passes) == 3 else None

    handle = loaded.unet.register_forward_hook(spoil)
    try:
        with pytest.raises(CompositionDiverged, match="in step 2"):
            compose.run(context)
    finally:
        handle.remove()


def test_an_image_that_the_checker_flags_is_given_to_nobody(bench: Bench, tmp_path: Path) -> None:
    from test_safety import write_checker

    context = bench.attempt(bench.params("first", preview_every=1))
    strict, mild = write_checker(tmp_path / "strict", -2.0), write_checker(tmp_path / "mild", 2.0)
    context.spec = replace(context.spec, safety_checker=str(strict))
    with pytest.raises(ImageFlagged):
        compose.run(context)
    with bench.pool.database.read() as session, pytest.raises(NotFound):
        previews.get_preview(session, context.spec.job_id)
    passed = bench.attempt(bench.params("first"))
    passed.spec = replace(passed.spec, safety_checker=str(mild))
    assert compose.run(passed).images
    absent = bench.attempt(bench.params("first"))
    absent.spec = replace(absent.spec, safety_checker=str(tmp_path / "absent"))
    with pytest.raises(RequestInvalid, match="can not be loaded"):
        compose.run(absent)


def test_a_method_that_fuses_publishes_an_adapter_with_its_lineage(bench: Bench) -> None:
    params = bench.params("first", "second", method="gradient_fusion", parameters={"samples": 1}, name="both")
    context = bench.attempt(params)
    result = publish(context, compose.run(context))
    assert result["images"] == []
    with bench.pool.database.read() as session:
        row = adapters.get_adapter(session, result["adapters"][0])
        history = adapters.lineage(session, row.id)
        assert (row.name, row.origin, row.model_id) == ("both", "compose", bench.base)
        assert row.rank == result["report"]["rank"] == 4
        recipes = {edge.parent_id: edge.recipe for edge in history.edges}
    assert recipes.keys() == {bench.ids["first"], bench.ids["second"]}
    assert recipes[bench.ids["second"]]["method"] == "gradient_fusion"
    # what came out is an adapter like any other
    bench.ids["both"] = result["adapters"][0]
    assert bench.png(bench.params("both")) != bench.png(bench.params("first"))


def test_a_deleted_adapter_is_named_with_its_place(bench: Bench) -> None:
    context = bench.attempt(bench.params("first", styles=[{"adapter": bench.ids["peft"], "weight": 0.5}]))
    with bench.pool.database.write() as session:
        adapters.delete_adapter(session, bench.ids["peft"])
    with pytest.raises(NotFound, match="was deleted since") as raised:
        compose.run(context)
    assert [item.pointer for item in raised.value.errors] == ["/styles/0/adapter"]


def test_one_adapter_may_be_named_twice(bench: Bench) -> None:
    report = compose.run(bench.attempt(bench.params("first", "first"))).report
    assert [item["adapter"] for item in report["concepts"]] == ["first", "first"]


def test_a_comparison_tells_its_progress_as_one_job(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, str]] = []
    real: Callable[..., None] = JobContext.progress

    def progress(self: JobContext, fraction: float, message: str, *args: Any) -> None:
        told.append((fraction, message))
        real(self, fraction, message, *args)

    monkeypatch.setattr(JobContext, "progress", progress)
    params = bench.params(methods=[{"method": "merge"}, {"method": "merge", "parameters": {"guidance_scale": 2}}])
    del params["method"]
    outcome = compare.run(bench.attempt(params, "compare"))
    assert [image.facts.label for image in outcome.images] == ["sheet", "merge", "merge 2"]
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions)
    assert told[-1][1] == "merge 2: step 2 of 2"


@pytest.mark.parametrize(
    ("given", "labels"),
    [
        ([("a", None), ("a", None), ("b", "a")], ["a", "a 2", "a 3"]),
        ([("a", "x"), ("b", None)], ["x", "b"]),
        ([("a", "a 2"), ("a", None), ("a", None)], ["a 2", "a", "a 3"]),
    ],
)
def test_every_image_of_a_sheet_has_a_label_of_its_own(given: list[tuple[str, str | None]], labels: list[str]) -> None:
    assert labels_of([{"method": method, "label": label} for method, label in given]) == labels
