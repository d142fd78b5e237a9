"""Bodies and what is in them: no model takes what its own JSON Schema excludes, such as a text for a number."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Annotated, Any

from excluded_values import excluded
from pydantic import BaseModel, TypeAdapter, ValidationError

import app.job_kinds
import compose.catalog
import merge.catalog
import train.catalog
import transfer.catalog
from app.main import create_app
from app.schemas.common import RequestModel

MENUS = (merge.catalog.MENU, train.catalog.METHODS, compose.catalog.METHODS, transfer.catalog.METHODS)


def descendants(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in model.__subclasses__():
        yield child
        yield from descendants(child)


def parts(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models that a type is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from parts(argument)


def sent() -> list[type[BaseModel]]:
    """Every model of a JSON body, of a job's parameters and of a method's, with all that they hold. A form's fields are
    texts."""
    assert create_app  # every schema is imported
    waiting = [model for model in descendants(RequestModel) if not model.__name__.endswith("Form")]
    waiting += [kind.params for kind in app.job_kinds.JOB_KINDS.values()]
    waiting += [row.options for menu in MENUS for row in menu.values()]
    found: dict[type[BaseModel], None] = {}
    while waiting:
        model = waiting.pop()
        if model not in found:
            found[model] = None
            waiting += [part for field in model.model_fields.values() for part in parts(field.annotation)]
    return list(found)


def test_no_field_takes_what_its_schema_excludes() -> None:
    known: set[str] = set()
    taken = []
    for model in sent():
        document = model.model_json_schema(by_alias=False)
        for name, schema in document.get("properties", {}).items():
            field = model.model_fields[name]
            if (key := repr((field.annotation, field.metadata))) in known:
                continue
            known.add(key)
            adapter = TypeAdapter[Any](
                Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
            )
            for value in excluded(schema, document.get("$defs")):
                try:
                    adapter.validate_python(value)
                except ValidationError:
                    continue
                taken.append(f"{model.__name__}.{name}: {value!r}")
    assert taken == []
    assert len(known) > 200
