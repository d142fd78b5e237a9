"""How an adapter, or a base model, can be made again: the call and its body, and whether that gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sqlalchemy.orm import Session

from app.schemas.recipes import AdapterRecipe, ModelRecipe, RecipeCall
from artifacts.base_model import weight_files
from artifacts.errors import FileBroken, FormatUnknown, NotFound
from storage import adapters, jobs, made_models, models
from storage.lineage import steps_to
from storage.tables import AdapterRow, LineageRow, ModelRow

_CALLS: Mapping[str, str] = MappingProxyType({"compose": "/compose-image", "train": "/train"})
"""Kind of a job that makes adapters → where its parameters are posted."""
_MERGES = frozenset({"merge", "merge_compare"})


def recipe_of(session: Session, adapter_id: str) -> AdapterRecipe:
    """What to post so that the adapter is made again.

    Raises:
        NotFound: no such adapter; a deleted one keeps its recipe.
    """
    row = adapters.get_adapter(session, adapter_id, deleted=True)
    if row.origin in _MERGES:
        edges = steps_to(session, row.id)
        if edges:
            return _of_merge(session, row, edges)
    if row.origin in _CALLS and row.job_id is not None:
        return _of_job(session, row)
    if row.source is not None:
        return _of_import(row, row.source)
    return AdapterRecipe(
        adapter=row.id,
        origin=row.origin,
        call=None,
        because=[
            "it was uploaded: its files are all that is known of its making"
            if row.origin == "upload"
            else f"it was made by a job of the kind {row.origin}, of which nothing is kept that could be posted again"
        ],
    )


def _of_merge(session: Session, row: AdapterRow, edges: Sequence[LineageRow]) -> AdapterRecipe:
    """Of the recipe that the merge left with every parent: what it was computed from, to the last parameter."""
    recipe = edges[0].recipe
    because = _against(session, recipe)
    return AdapterRecipe(
        adapter=row.id,
        origin=row.origin,
        call=_merge_call(recipe, row.name),
        found_by=_search_of(session, row) if "search" in recipe else None,
        versions=recipe["versions"],
        reproducible=not because,
        because=because,
    )


def _merge_call(recipe: Mapping[str, Any], name: str, **more: Any) -> RecipeCall:
    body = {
        "adapters": [{"id": item["id"], "weight": item["weight"]} for item in recipe["adapters"]],
        "method": recipe["method"],
        "parameters": recipe["parameters"],
        "name": name,
        **({"convert": True} if recipe.get("convert") else {}),
        **more,
    }
    return RecipeCall(path="/merge", body=body)


def _against(session: Session, recipe: Mapping[str, Any]) -> list[str]:
    """What stands against the same bytes when a merge is posted again."""
    return [
        *_other_versions(recipe["versions"]),
        *(f"the adapter {item['id']} was deleted" for item in recipe["adapters"] if not _is_there(session, item["id"])),
    ]


def recipe_of_model(session: Session, model_id: str) -> ModelRecipe:
    """What to post so that a base model is made again; those that merges made can be.

    Raises:
        NotFound: no such model; a removed one keeps what is known of its making.
    """
    row = models.get_model(session, model_id)
    made = made_models.made_model(session, row.id)
    if made is None:
        problem = "it was registered by its place: no job made it, or its files went with it when it was removed"
        return ModelRecipe(model=row.id, call=None, because=[problem])
    recipe = made.recipe
    if recipe.get("output") != "base":
        problem = f"it was made by the job {made.job_id}, whose parameters are all that could be posted again"
        return ModelRecipe(model=row.id, call=None, because=[problem])
    base = recipe["base_model"]
    into = {name: recipe[name] for name in ("output", "dtype", "force")}
    because = _against(session, recipe)
    of_base = models.get_model(session, base["id"])
    if of_base.removed_at is not None:
        because.append(f"the base model {base['id']} was removed")
    elif of_base.source == "path":
        because += _moved_on(of_base)
    commit = base.get("commit")
    if commit is not None and of_base.revision != commit:
        because.append(f"the base model was at commit {commit} of its repository, and is registered without it")
    return ModelRecipe(
        model=row.id,
        call=_merge_call(recipe, row.name, **into, base_model=base["id"]),
        versions=recipe["versions"],
        reproducible=not because,
        because=because,
    )


def _moved_on(base: ModelRow) -> list[str]:
    """What stands against a base model in a folder having the bytes that it was registered with. Times are looked at,
    not digests: those would read every byte."""
    try:
        written = max(file.stat().st_mtime for file in weight_files(Path(base.location)))
    except (FormatUnknown, FileBroken, OSError):
        return [f"the weights of the base model {base.id} are not in its folder any more"]
    if written > base.created_at.timestamp():
        return [f"the weights of the base model {base.id} were written to after it was registered"]
    return []


def _of_import(row: AdapterRow, source: Mapping[str, Any]) -> AdapterRecipe:
    """Of the commit, or with the digest of the one file: other bytes are refused."""
    place: dict[str, Any]
    because = []
    if source["kind"] == "hub":
        place = {"hub": {"repo": source["repo"], "revision": source["revision"], "path": source["path"]}}
    else:
        if source["kind"] == "url":
            place = {"url": source["url"]}
            if source["query"]:
                because.append("the URL had a query, which is not kept")
        else:
            place = {"s3": {name: source[name] for name in ("bucket", "key", "prefix") if source[name] is not None}}
        if len(source["files"]) == 1:
            place["sha256"] = source["files"][0]["sha256"]
        else:
            because.append("what lies under the prefix may be other files by now")
    return AdapterRecipe(
        adapter=row.id,
        origin=row.origin,
        call=RecipeCall(path="/adapters/import", body={"source": place, "name": row.name}),
        reproducible=not because,
        because=because,
    )


def _search_of(session: Session, row: AdapterRow) -> RecipeCall | None:
    """The search that found it, as long as its job is there."""
    if row.job_id is None:
        return None
    return RecipeCall(path="/merge", body=dict(jobs.get_job(session, row.job_id).params))


def _of_job(session: Session, row: AdapterRow) -> AdapterRecipe:
    """The parameters of its job, as they were sent."""
    assert row.job_id is not None
    job = jobs.get_job(session, row.job_id)
    report = (job.result or {}).get("report") or {}
    body = dict(job.params)
    because = []
    if body.get("transferable") is not None:
        body["transferable"] = None
        because.append("its seeds are confidential, so that the call makes the adapter without what transfers need")
    versions: dict[str, str] = report.get("versions") or {}
    return AdapterRecipe(
        adapter=row.id,
        origin=row.origin,
        call=RecipeCall(path=_CALLS[row.origin], body=body),
        versions=versions,
        reproducible=False,
        because=[
            *because,
            *_other_versions(versions),
            f"what {row.origin} jobs make also depends on the device and on its number of threads",
        ],
    )


def _other_versions(then: Mapping[str, str]) -> list[str]:
    """What is not as it was when the adapter was made."""
    found = []
    for library, old in then.items():
        try:
            now = version(library)
        except PackageNotFoundError:
            now = "not installed"
        if now != old:
            found.append(f"{library} was {old} and is {now} on this server")
    return found


def _is_there(session: Session, adapter_id: str) -> bool:
    try:
        adapters.get_adapter(session, adapter_id)
    except NotFound:
        return False
    return True
