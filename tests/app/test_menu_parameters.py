"""Every menu: every parameter of every method, given what its own schema excludes, is refused by its pointer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
from excluded_values import excluded
from training_server import training_server

import compose.catalog
import merge.catalog
import train.catalog
import transfer.catalog
from merge.options import LegoOptions
from train.options.bone import REFUSED

CALLS: Mapping[str, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        "merge": ("/merge", merge.catalog.METHODS),
        "train": ("/train", train.catalog.METHODS),
        "compose": ("/compose-image", compose.catalog.METHODS),
        "transfer": ("/transfer", transfer.catalog.METHODS),
    }
)
"""Kind of a menu → where its methods are asked for, and the menu."""
ALL = pytest.mark.parametrize(("kind", "method"), [(kind, name) for kind, (_, menu) in CALLS.items() for name in menu])
ABSENT = "0" * 32


@pytest.fixture(scope="module")
def site(
    module_servers: Any, adapter_files: Any, make_safetensors: Any, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """A server, and by the kind of a menu a body without method and parameters."""
    server, training = training_server(module_servers, tmp_path_factory.mktemp("base"), make_safetensors)
    ids = [server.upload(adapter_files(seed=seed).parts()).json()["id"] for seed in (1, 2)]
    # What is named for a scene and a transfer is looked for when the parameters are known to be right.
    return server, {
        "merge": {"adapters": [{"id": key} for key in ids]},
        "train": training,
        "compose": {
            "base_model": f"mdl_{ABSENT}",
            "concepts": [{"adapter": f"adp_{ABSENT}", "noun": "cat"}],
            "prompt": "a cat",
        },
        "transfer": {"adapter": f"adp_{ABSENT}", "target_model": f"mdl_{ABSENT}"},
    }


def refusal(site: Any, kind: str, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """The problem, by pointer."""
    server, bodies = site
    body = {**bodies[kind], "method": method, "parameters": parameters}
    response = server.client.post(CALLS[kind][0], json=body)
    problem = response.json()
    assert (response.status_code, problem.get("code")) == (422, "invalid_request"), (parameters, problem)
    assert response.headers["content-type"] == "application/problem+json"
    assert method in problem["hint"]
    return {item["pointer"]: item["message"] for item in problem["errors"]}


@ALL
def test_what_the_schema_excludes_is_refused_by_its_pointer(site: Any, kind: str, method: str) -> None:
    shown = site[0].client.get(f"/methods/{kind}/{method}").json()["parameters_schema"]
    assert shown["additionalProperties"] is False
    bad = {name: excluded(schema, shown.get("$defs")) for name, schema in shown["properties"].items()}
    assert min(len(values) for values in bad.values()) > 3
    for number in range(max(len(values) for values in bad.values())):
        tried = {name: values[number] for name, values in bad.items() if number < len(values)}
        found = refusal(site, kind, method, tried)
        assert set(found) == {f"/parameters/{name}" for name in tried}, tried
        assert all(message.startswith(f"{pointer.rpartition('/')[2]}: ") for pointer, message in found.items())
    assert site[0].rows()["jobs"] == 0


@ALL
def test_parameters_of_other_methods_and_of_none_are_refused_by_name(site: Any, kind: str, method: str) -> None:
    menu = CALLS[kind][1]
    others = {field for row in menu.values() for field in row.options.model_fields}
    others -= set(menu[method].options.model_fields)
    if method == "bone":  # tells why it has none of these, before all else
        others -= set(REFUSED)
    found = refusal(site, kind, method, dict.fromkeys(others, 1) | {"a/b~c": 1, "": 1, "Scale": 1})
    expected = {f"/parameters/{name}" for name in (*others, "", "Scale")} | {"/parameters/a~1b~0c"}
    assert set(found) == expected
    assert site[0].rows()["jobs"] == 0


def test_a_name_without_end_is_shown_short(site: Any) -> None:
    found = refusal(site, "merge", "cat", {"x" * 5000: 1})
    assert len(next(iter(found.values()))) < 200


def test_the_other_name_of_legos_rank_is_checked_alike(site: Any) -> None:
    schema = LegoOptions.model_json_schema(by_alias=False)["properties"]["rank"]
    for value in excluded(schema):
        assert set(refusal(site, "merge", "lego", {"k": value})) == {"/parameters/k"}
