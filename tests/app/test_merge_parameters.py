"""POST /merge: every parameter of every method, given what its own schema excludes, is refused by its pointer."""

from __future__ import annotations

import math
from typing import Any

import pytest

from merge.catalog import METHODS
from merge.options import LegoOptions

VALUES: tuple[Any, ...] = ("no such", "1", "", True, None, [], {}, 0.5, -1e300, 1e300, -1, 0, 2**62)
"""What is tried where a schema excludes it, beside the numbers right outside of its bounds."""
FIELDS = {field for row in METHODS.values() for field in row.options.model_fields}


def takes(schema: dict[str, Any], value: Any) -> bool:
    """Whether a schema of these menus allows a value: types, choices and bounds."""
    if "anyOf" in schema:
        return any(takes(branch, value) for branch in schema["anyOf"])
    if "enum" in schema:
        return any(value is choice or (type(value) is type(choice) and value == choice) for choice in schema["enum"])
    kinds = {"string": str, "boolean": bool, "null": type(None), "integer": int, "number": (int, float)}
    if not isinstance(value, kinds[schema["type"]]) or (isinstance(value, bool) and schema["type"] != "boolean"):
        return False
    if schema["type"] not in {"integer", "number"}:
        return True
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    return bool(low <= value <= high and above < value < below)


def excluded(schema: dict[str, Any]) -> list[Any]:
    found = list(VALUES)
    for branch in schema.get("anyOf", [schema]):
        step = 1 if branch.get("type") == "integer" else 1e-9
        if "minimum" in branch:
            found.append(branch["minimum"] - step)
        if "maximum" in branch:
            found.append(branch["maximum"] + step * max(1, branch["maximum"]))
        found += [branch[bound] for bound in ("exclusiveMinimum", "exclusiveMaximum") if bound in branch]
    # an integer that no column holds is no JSON here: 400
    return [value for value in found if not takes(schema, value) and not (isinstance(value, int) and value >= 2**63)]


@pytest.fixture(scope="module")
def pool(module_servers: Any, adapter_files: Any) -> Any:
    """A server and two adapters."""
    server = module_servers()
    ids = [server.upload(adapter_files(seed=seed).parts()).json()["id"] for seed in (1, 2)]
    return server, [{"id": key} for key in ids]


def refusal(pool: Any, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The problem, by pointer; and nothing is queued."""
    server, adapters = pool
    body = {"adapters": adapters, "method": method, "parameters": parameters}
    response = server.client.post("/merge", json=body)
    problem = response.json()
    assert (response.status_code, problem.get("code")) == (422, "invalid_request"), (parameters, problem)
    assert response.headers["content-type"] == "application/problem+json"
    assert method in problem["hint"]
    return {item["pointer"]: item["message"] for item in problem["errors"]}


@pytest.mark.parametrize("method", METHODS)
def test_what_the_schema_excludes_is_refused_by_its_pointer(pool: Any, method: str) -> None:
    shown = pool[0].client.get(f"/methods/merge/{method}").json()["parameters_schema"]
    assert shown["additionalProperties"] is False
    bad = {name: excluded(schema) for name, schema in shown["properties"].items()}
    assert min(len(values) for values in bad.values()) > 3
    for number in range(max(len(values) for values in bad.values())):
        tried = {name: values[number] for name, values in bad.items() if number < len(values)}
        found = refusal(pool, method, tried)
        assert set(found) == {f"/parameters/{name}" for name in tried}, tried
        assert all(message.startswith(f"{pointer.rpartition('/')[2]}: ") for pointer, message in found.items())
    assert pool[0].rows()["jobs"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_other_methods_and_of_none_are_refused_by_name(pool: Any, method: str) -> None:
    others = FIELDS - set(METHODS[method].options.model_fields)
    found = refusal(pool, method, dict.fromkeys(others, 1) | {"a/b~c": 1, "": 1, "Scale": 1})
    expected = {f"/parameters/{name}" for name in (*others, "", "Scale")} | {"/parameters/a~1b~0c"}
    assert set(found) == expected
    assert pool[0].rows()["jobs"] == 0


def test_a_name_without_end_is_shown_short(pool: Any) -> None:
    found = refusal(pool, "cat", {"x" * 5000: 1})
    assert len(next(iter(found.values()))) < 200


def test_the_other_name_of_legos_rank_is_checked_alike(pool: Any) -> None:
    schema = LegoOptions.model_json_schema(by_alias=False)["properties"]["rank"]
    for value in excluded(schema):
        assert set(refusal(pool, "lego", {"k": value})) == {"/parameters/k"}
