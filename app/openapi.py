"""The OpenAPI document: what FastAPI derives, and what it can not know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app.job_kinds import JOB_KINDS
from app.problems import Problem
from app.schemas.transfer import FleetParams
from compose.catalog import METHODS as COMPOSE_METHODS
from merge.catalog import MENU as MERGE_MENU
from merge.catalog import METHODS as MERGE_METHODS
from train.catalog import METHODS as TRAIN_METHODS
from transfer.catalog import METHODS as TRANSFER_METHODS

REF_TEMPLATE = "#/components/schemas/{model}"
PUBLIC_OPERATIONS = frozenset({"index", "healthz", "readyz", "list_problems", "get_problem"})

_MENUS: Mapping[str, Mapping[str, Any]] = {
    "Merge": MERGE_MENU,
    "Compose": COMPOSE_METHODS,
    "Train": TRAIN_METHODS,
    "Transfer": TRANSFER_METHODS,
}
"""By what the schemas of their requests are called."""

_ADAPTER_CALLS = (
    "get_adapter",
    "get_lineage",
    "get_recipe",
    "convert_adapter",
    "check_loading",
    "download_adapter",
    "head_adapter",
    "put_waiver",
    "delete_waiver",
    "delete_adapter",
)
_DATASET_CALLS = ("get_dataset", "list_rows", "download_dataset", "head_dataset", "delete_dataset")
_IMAGE_CALLS = ("get_image", "get_image_file", "head_image_file", "delete_image")
_MODEL_CALLS = (
    "get_model",
    "patch_model",
    "deprecate_model",
    "delete_model",
    "get_model_file",
    "head_model_file",
    "quantize_model",
)
_JOB_CALLS = (
    "get_job",
    "follow_job",
    "list_attempts",
    "get_log",
    "get_metrics",
    "get_loss_curve",
    "list_pictures",
    "get_preview",
    "cancel_job",
    "retry_job",
)
_SCHEDULE_CALLS = (
    "get_schedule",
    "patch_schedule",
    "trigger_schedule",
    "dry_run_schedule",
    "list_upcoming",
    "list_firings",
)
_WEBHOOK_CALLS = (
    "get_webhook",
    "patch_webhook",
    "list_deliveries",
    "send_test_message",
    "rotate_webhook_secret",
    "delete_webhook",
)
_TRANSFER_CALLS = ("get_transfer", "get_transfer_report", "decide_transfer")
_ALIAS_CALLS = ("get_alias", "put_alias", "download_alias", "delete_alias")
_FIRST, _NEW = "$response.body#/items/0/id", "$response.body#/id"
# (operation, status, where its answer has the id, parameter that takes it, operations that do)
_LINKS = (
    ("list_adapters", "200", _FIRST, "adapter_id", _ADAPTER_CALLS),
    ("upload_adapter", "200", _NEW, "adapter_id", _ADAPTER_CALLS),
    ("upload_adapter", "201", _NEW, "adapter_id", _ADAPTER_CALLS),
    ("list_aliases", "200", "$response.body#/items/0/name", "name", _ALIAS_CALLS),
    ("list_datasets", "200", _FIRST, "dataset_id", _DATASET_CALLS),
    ("upload_dataset", "200", _NEW, "dataset_id", _DATASET_CALLS),
    ("upload_dataset", "201", _NEW, "dataset_id", _DATASET_CALLS),
    ("list_models", "200", _FIRST, "model_id", _MODEL_CALLS),
    ("register_model", "200", _NEW, "model_id", _MODEL_CALLS),
    ("register_model", "201", _NEW, "model_id", _MODEL_CALLS),
    ("list_jobs", "200", _FIRST, "job_id", _JOB_CALLS),
    ("merge_adapters", "202", _NEW, "job_id", _JOB_CALLS),
    ("compare_merges", "202", _NEW, "job_id", _JOB_CALLS),
    ("convert_adapter", "202", _NEW, "job_id", _JOB_CALLS),
    ("check_loading", "202", _NEW, "job_id", _JOB_CALLS),
    ("quantize_model", "202", _NEW, "job_id", _JOB_CALLS),
    ("compose_image", "202", _NEW, "job_id", _JOB_CALLS),
    ("compare_images", "202", _NEW, "job_id", _JOB_CALLS),
    ("list_images", "200", _FIRST, "image_id", _IMAGE_CALLS),
    ("train_adapter", "202", _NEW, "job_id", _JOB_CALLS),
    ("create_schedule", "201", _NEW, "schedule_id", (*_SCHEDULE_CALLS, "delete_schedule")),
    ("list_schedules", "200", _FIRST, "schedule_id", _SCHEDULE_CALLS),
    ("trigger_schedule", "202", _NEW, "job_id", _JOB_CALLS),
    ("list_transfers", "200", _FIRST, "job_id", _TRANSFER_CALLS),
    ("create_webhook", "201", _NEW, "webhook_id", _WEBHOOK_CALLS),
    ("list_webhooks", "200", _FIRST, "webhook_id", _WEBHOOK_CALLS),
)


def operation_id(route: APIRoute) -> str:
    """The handler's name: short, and stable when a path changes."""
    return route.name


def complete(document: dict[str, Any], *, api_keys: bool) -> dict[str, Any]:
    """Add schemas of problems and of options, links between the calls, and the security schemes when keys are on."""
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas.update(_definitions())
    for kind, menu in _MENUS.items():
        for name in (f"{kind}Request", f"{kind}Params"):
            _one_of_these(schemas[name]["properties"]["parameters"], [row.options for row in menu.values()])
    trainings = [row.options for row in TRAIN_METHODS.values()]
    for row in TRANSFER_METHODS.values():
        if "target_parameters" in row.options.model_fields:
            _one_of_these(schemas[row.options.__name__]["properties"]["target_parameters"], trainings)
    compositions = [row.options for row in COMPOSE_METHODS.values()]
    _one_of_these(schemas["CompareMethod"]["properties"]["parameters"], compositions)
    merges = [row.options for row in MERGE_METHODS.values()]
    _one_of_these(schemas["MergeCandidate"]["properties"]["parameters"], merges)
    moves = [row.options for row in TRANSFER_METHODS.values()]
    _one_of_these(schemas["FleetParams"]["properties"]["parameters"], moves)
    kinds: list[type[BaseModel]] = [*(kind.params for kind in JOB_KINDS.values()), FleetParams]
    _one_of_these(schemas["ScheduledJob"]["properties"]["params"], kinds)
    operations = dict(_operations(document))
    for operation in operations.values():
        _drop_null_parameters(operation)
    _add_links(operations)
    if api_keys:
        _declare_security(components, operations)
    return document


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for methods in document["paths"].values():
        for operation in methods.values():
            yield operation["operationId"], operation


def _definitions() -> dict[str, Any]:
    _, problems = models_json_schema([(Problem, "serialization")], ref_template=REF_TEMPLATE)
    _, options = models_json_schema(
        [(row.options, "validation") for menu in _MENUS.values() for row in menu.values()],
        by_alias=False,
        ref_template=REF_TEMPLATE,
    )
    _, kinds = models_json_schema(
        [(kind.params, "validation") for kind in JOB_KINDS.values()], ref_template=REF_TEMPLATE
    )
    return {**problems["$defs"], **options["$defs"], **kinds["$defs"]}


def _one_of_these(schema: dict[str, Any], models: Sequence[type[BaseModel]]) -> None:
    """What is an object for FastAPI is one of `models`, each of which says what it takes."""
    del schema["additionalProperties"]
    schema["anyOf"] = [{"$ref": REF_TEMPLATE.format(model=model.__name__)} for model in models]


def _drop_null_parameters(operation: dict[str, Any]) -> None:
    """A parameter is left out or has a value: a URL or a header has no null."""
    for parameter in operation.get("parameters", ()):
        schema = parameter["schema"]
        branches = [item for item in schema.get("anyOf", ()) if item != {"type": "null"}]
        if len(branches) == 1:
            del schema["anyOf"]
            parameter["schema"] = {**branches[0], **schema}


def _add_links(operations: dict[str, dict[str, Any]]) -> None:
    for source, status, expression, parameter, targets in _LINKS:
        links = operations[source]["responses"][status].setdefault("links", {})
        for target in targets:
            links[target] = {"operationId": target, "parameters": {parameter: expression}}


def _declare_security(components: dict[str, Any], operations: dict[str, dict[str, Any]]) -> None:
    components["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer", "description": "An API key, `rw_…`."},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    for name, operation in operations.items():
        if name not in PUBLIC_OPERATIONS:
            operation["security"] = [{"bearer": []}, {"header": []}]
