"""The menu: parameters are validated with pointers, and every entry is complete."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from artifacts.errors import RequestInvalid
from merge import catalog
from merge.catalog import METHODS, Capabilities, MergeMethod, find_method, parse_parameters
from merge.peer_options import KnotsOptions, SlerpOptions


@pytest.mark.parametrize(
    ("method", "parameters", "pointer"),
    [
        ("lego", {"rank": 0}, "/parameters/rank"),
        ("lego", {"rank": -3}, "/parameters/rank"),
        ("lego", {"rank": 2.5}, "/parameters/rank"),
        ("lego", {"rank": True}, "/parameters/rank"),
        ("lego", {"rank": "3r"}, "/parameters/rank"),
        ("lego", {"k": 0}, "/parameters/k"),
        ("lego", {"rank": 4, "k": 4}, "/parameters"),
        ("lego", {"scale": float("nan")}, "/parameters/scale"),
        ("lego", {"scale": 0}, "/parameters/scale"),
        ("lego", {"scale": 1e300}, "/parameters/scale"),
        ("lego", {"parameter_reweight": "l1"}, "/parameters/parameter_reweight"),
        ("lego", {"reference_rank": 0}, "/parameters/reference_rank"),
        ("lego", {"n_init": 0}, "/parameters/n_init"),
        ("lego", {"max_iter": 0}, "/parameters/max_iter"),
        ("lego", {"tol": -1}, "/parameters/tol"),
        ("lego", {"seed": -1}, "/parameters/seed"),
        ("lego", {"sign_alignment": "both"}, "/parameters/sign_alignment"),
        ("lego", {"compute_dtype": "float16"}, "/parameters/compute_dtype"),
        ("lego", {"normalize": True}, "/parameters/normalize"),
        ("lego", {"preset": "paper", "feature": "unit"}, "/parameters"),
        ("svd", {"rank": 0}, "/parameters/rank"),
        ("linear", {"rank": "3r"}, "/parameters/rank"),
        ("cat", {"typo": 1}, "/parameters/typo"),
    ],
)
def test_each_bad_parameter_is_named(method: str, parameters: dict[str, Any], pointer: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        parse_parameters(method, parameters)
    assert [item.pointer for item in caught.value.errors] == [pointer]
    assert caught.value.detail.startswith(f"The parameters of merge method {method!r} are not valid: ")
    if parameters.get("scale") == 0:
        assert "must not be 0: the merged adapter would do nothing" in caught.value.errors[0].message
    assert caught.value.hint is not None
    assert method in caught.value.hint


def test_the_paper_preset() -> None:
    values = parse_parameters("lego", {"preset": "paper"}).model_dump()
    fixed = {name: values[name] for name in ("sign_alignment", "canonicalize", "feature", "reweight_cap")}
    assert fixed == {"sign_alignment": "none", "canonicalize": "none", "feature": "raw", "reweight_cap": None}
    assert values["rank"] == "2r"


def test_an_unknown_method_is_answered_with_the_known_ones() -> None:
    with pytest.raises(RequestInvalid, match="no merge method 'average'") as caught:
        find_method("average")
    assert caught.value.errors[0].pointer == "/method"
    assert "lego" in caught.value.errors[0].message


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_entry_is_complete(name: str) -> None:
    row = METHODS[name]
    assert callable(row.load())
    assert (Path(__file__).parent / f"test_{row.family}.py").is_file()
    schema = row.options.model_json_schema()
    undescribed = [field for field, body in schema["properties"].items() if "description" not in body]
    assert not undescribed
    # what the API stores of a job can be read back
    assert parse_parameters(name, row.options().model_dump(mode="json")) == row.options()


def test_the_menu_needs_no_torch() -> None:
    code = "import sys, merge.catalog, merge.plan; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", METHODS)
def test_each_row_is_whole(name: str) -> None:
    row = METHODS[name]
    module, _, function = row.implementation.partition(":")
    assert row.name == name
    assert name in (function, module.rpartition(".")[2])
    assert row.options.__name__.endswith("Options")
    assert row.reference_url.startswith("https://")
    assert (row.arxiv is None) is ("arxiv.org" not in row.reference_url)
    assert row.arxiv is None or row.reference_url == f"https://arxiv.org/abs/{row.arxiv}"
    assert {type(row.capabilities.negative_weights), type(row.capabilities.exact_sum)} == {bool}
    assert parse_parameters(name, {}).scale == 1


def test_a_row_is_made_of_its_address_and_its_source() -> None:
    paper = catalog._peer("knots:merge", "KnOTS", "One SVD.", KnotsOptions, "2410.19735")
    assert paper == MergeMethod(
        name="knots",
        title="KnOTS",
        summary="One SVD.",
        options=KnotsOptions,
        implementation="merge.methods.knots:merge",
        arxiv="2410.19735",
        reference_url="https://arxiv.org/abs/2410.19735",
        capabilities=Capabilities(negative_weights=True, lora_bias=False, exact_sum=False, only_adapters=None),
    )
    assert (paper.family, paper.page) == ("knots", "knots.md")
    page = "https://example.org/a:b"
    other = catalog._peer("coefficients:slerp", "S", "T.", SlerpOptions, page, negative_weights=False, only_adapters=2)
    assert (other.name, other.arxiv, other.reference_url) == ("slerp", None, page)
    assert other.capabilities == Capabilities(False, False, False, 2)
    assert (other.family, other.page) == ("coefficients", "coefficients.md#slerp")
