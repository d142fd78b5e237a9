"""What the commands that fetch, send and merge make of their arguments, before a service is asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import typer

from app.cli.importing import place_of
from app.cli.pushing import target_of

ADAPTER = "adp_" + "0" * 32


def test_where_an_adapter_is() -> None:
    assert place_of("acme/mine", {"revision": "v1", "path": None}) == {"hub": {"repo": "acme/mine", "revision": "v1"}}
    assert place_of("https://a.org/x.zip", {}) == {"url": "https://a.org/x.zip"}
    assert place_of("s3://bucket/a/x.zip", {}) == {"s3": {"bucket": "bucket", "key": "a/x.zip"}}
    assert place_of("s3://bucket/a/", {}) == {"s3": {"bucket": "bucket", "prefix": "a/"}}
    with pytest.raises(typer.BadParameter):
        place_of("https://a.org/x.zip", {"revision": "v1"})


def test_where_an_adapter_goes() -> None:
    assert target_of("acme/mine", {"private": False}) == {"hub": {"repo": "acme/mine", "private": False}}
    layout = {"s3": {"bucket": "bucket", "prefix": "a/b"}}
    assert target_of("s3://bucket/a/b", {}) == {"oci": layout}
    assert target_of("s3://bucket/a/b:v1", {}) == {"oci": {**layout, "tag": "v1"}}
    for target, options in (("s3://bucket", {}), ("s3://bucket/a", {"message": "no"})):
        with pytest.raises(typer.BadParameter):
            target_of(target, options)


@pytest.mark.parametrize(
    "arguments",
    [
        (ADAPTER, "--dtype", "float32"),
        (ADAPTER, "--into-base", "-o", "out"),
        ("a/", "b/", "-o", "out", "--convert"),
    ],
)
def test_merges_that_are_refused_here(cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    assert cli("merge", *arguments).code == 2
