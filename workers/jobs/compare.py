"""The job kind "compare": one scene by several methods from the same noise, and a sheet of all the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from artifacts.labels import labels_of
from compose.composition import Composition
from compose.contact_sheet import contact_sheet
from compose.evidence_files import IMAGE
from compose.recipe import save_png
from storage.images import ImageFacts
from workers.context import JobContext, JobOutcome, NewFile, NewImage
from workers.jobs.kitchen import FETCHED, SAMPLED, Kitchen, teller

SHEET = "sheet"


def run(context: JobContext) -> JobOutcome:
    """Make the images that the job's parameters describe, and the sheet, which is the first of the results.

    `params`: as of a compose job, with methods: [{method, parameters, label}] in the place of method and parameters.

    Raises: as `workers.jobs.compose.run`.
    """
    kitchen = Kitchen.of(context)
    variants: Sequence[Mapping[str, Any]] = context.params["methods"]
    labels = labels_of(variants)
    share = (SAMPLED - FETCHED) / len(variants)
    made: list[tuple[str, Composition]] = []
    images: list[NewImage] = []
    for number, (label, variant) in enumerate(zip(labels, variants, strict=True)):
        request = kitchen.request(variant["method"], variant.get("parameters") or {})
        begin = FETCHED + share * number
        found = kitchen.compose(request, teller(context, begin, begin + share, f"{label}: "))
        images.append(kitchen.image(request, found, context.scratch / f"image-{number}", label=label))
        made.append((label, found))
    report = {
        "variants": [
            {"label": label, "method": found.report["method"], "report": dict(found.report)} for label, found in made
        ]
    }
    return JobOutcome(images=(_sheet(context, made, images, report), *images), report=report)


def _sheet(
    context: JobContext, made: Sequence[tuple[str, Composition]], images: Sequence[NewImage], report: Mapping[str, Any]
) -> NewImage:
    picture = contact_sheet([(label, found.image) for label, found in made])
    recipe = {"sheet_of": [{"label": image.facts.label, "recipe": dict(image.facts.recipe)} for image in images]}
    folder = context.scratch / SHEET
    folder.mkdir()
    save_png(picture, folder / IMAGE, recipe)
    first = images[0].facts
    facts = ImageFacts(
        label=SHEET,
        method=None,
        base_model=first.base_model,
        model_id=first.model_id,
        prompt=first.prompt,
        seed=first.seed,
        width=picture.width,
        height=picture.height,
        recipe=recipe,
        report=report,
    )
    return NewImage(facts, (NewFile(folder / IMAGE, "image"),))
