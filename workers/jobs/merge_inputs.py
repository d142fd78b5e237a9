"""What jobs that merge have in common: the adapters they take, the recipe of what they make, and its row."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from artifacts import intake
from artifacts.pointers import pointers_below
from merge.options import MergeOptions
from merge.plan import MergeInput
from storage import adapters
from storage.adapters import Parent
from workers.adapter_names import default_name
from workers.context import JobContext, NewAdapter, StoredAdapter
from workers.jobs.convert import needed_of, to_lora

LIBRARIES = ("rankwise", "torch", "numpy", "numba")


@dataclass(frozen=True, slots=True)
class MergeSources:
    """The adapters of a merge in the order of the request, each with its weight and a folder of its files."""

    items: tuple[tuple[StoredAdapter, float, Path], ...]
    conversions: tuple[Mapping[str, Any], ...] = ()  # the report on each that was made a plain LoRA first
    digests: Mapping[str, str] = field(default_factory=dict)  # id → that of its own weights, of those

    @classmethod
    def fetch(cls, context: JobContext, share: float) -> MergeSources:
        """Those that the job's `adapters` name: [{id, weight}].

        Args:
            share: of the progress bar.

        Raises:
            NotFound: an adapter was deleted since the job was submitted.
        """
        asked: Sequence[Mapping[str, Any]] = context.params["adapters"]
        found = []
        for position, item in enumerate(asked):
            context.progress(share * position / len(asked), "fetching adapters", position, len(asked))
            stored, directory = context.adapter(item["id"])
            weight = item.get("weight")
            found.append((stored, 1.0 if weight is None else float(weight), directory))
        return cls(tuple(found))

    def converted(self, context: JobContext) -> MergeSources:
        """With plain LoRAs in the place of adapters that a merge does not take as they are; each is made with the base
        model that it belongs to.

        Raises:
            MergeRefused and its kin: as `merge.conversion.convert_to_lora`.
        """
        items, reports, digests = [], [], {}
        for position, (stored, weight, directory) in enumerate(self.items):
            if stored.manifest.mergeable:
                items.append((stored, weight, directory))
                continue
            with context.database.read() as session:
                model = adapters.model_of(session, adapters.get_adapter(session, stored.id))
            output = context.scratch / "converted" / str(position)
            output.parent.mkdir(exist_ok=True)
            needs = needed_of(stored) in ("sides", "weights")
            place = f"/adapters/{position}/id"
            with pointers_below(place, "/base_model"), pointers_below(place, "/rank"):
                report = to_lora(
                    context, stored, directory, output, base_model=model.id if needs and model is not None else None
                )
            digests[stored.id] = stored.manifest.weights_digest
            manifest = intake.inspect(output, base_model=stored.base_model)
            items.append((replace(stored, manifest=manifest), weight, output))
            told = report.to_dict()
            del told["modules"]
            reports.append({"adapter": stored.id, **told})
        return MergeSources(tuple(items), tuple(reports), digests)

    def inputs(self) -> list[tuple[MergeInput, Path]]:
        """As the engine takes them."""
        return [
            (MergeInput.of(stored.manifest, stored.id, stored.name, stored.base, weight), directory)
            for stored, weight, directory in self.items
        ]

    def recipe(self, method: str, options: MergeOptions) -> dict[str, Any]:
        """All that is needed to do a merge again: every effective parameter and the versions that computed it."""
        parameters = json.loads(options.model_dump_json())
        return {
            "method": method,
            "parameters": parameters,
            "seed": parameters.get("seed"),
            "adapters": [
                {
                    "id": stored.id,
                    "weight": weight,
                    "weights_digest": self.digests.get(stored.id, stored.manifest.weights_digest),
                }
                for stored, weight, _ in self.items
            ],
            "versions": {library: version(library) for library in LIBRARIES},
        } | ({"convert": True} if self.conversions else {})

    def weighted(self, weights: Sequence[float]) -> MergeSources:
        """The same adapters under other weights."""
        pairs = zip(self.items, weights, strict=True)
        return MergeSources(tuple((stored, weight, directory) for (stored, _, directory), weight in pairs))

    def adapter(
        self,
        directory: Path,
        method: str,
        recipe: Mapping[str, Any],
        name: str | None,
        *,
        search: Mapping[str, Any] | None = None,
    ) -> NewAdapter:
        """The merged adapter in `directory`; without a name it is called after what it was made of.

        Args:
            search: that it was found by; it goes into the lineage once, beside the recipe of the first parent.
        """
        stored = [item for item, _, _ in self.items]
        return NewAdapter(
            directory=directory,
            name=name or default_name([item.name for item in stored], method),
            description=f"Merged from {len(stored)} adapters with {method}.",
            base_model=next((item.base_model for item in stored if item.base_model is not None), None),
            model_id=self.common_model,
            parents=tuple(
                Parent(
                    item.id,
                    {
                        "weight": weight,
                        "position": position,
                        **recipe,
                        **({"search": dict(search)} if search is not None and position == 0 else {}),
                    },
                )
                for position, (item, weight, _) in enumerate(self.items)
            ),
        )

    @property
    def common_model(self) -> str | None:
        """The registered base model, when all adapters have the same one."""
        ids = {item.model_id for item, _, _ in self.items}
        return ids.pop() if len(ids) == 1 else None
