"""What a JSON Schema of the menus and of the bodies does not allow, as values that can be sent."""

from __future__ import annotations

import math
import re
from typing import Any

VALUES: tuple[Any, ...] = ("no such", "1", "", True, None, [], {}, 0.5, -1e300, 1e300, -1, 0, 2**62)
"""What is tried where a schema excludes it, beside the numbers right outside of its bounds."""
_KINDS = {
    "string": str,
    "boolean": bool,
    "null": type(None),
    "integer": int,
    "number": (int, float),
    "array": list,
    "object": dict,
}


def takes(schema: dict[str, Any], value: Any, defs: dict[str, Any] | None = None) -> bool:
    """Whether a schema allows a value: types, choices, bounds, sizes and patterns; of an object, by its names alone."""
    if "$ref" in schema:
        return takes((defs or {})[schema["$ref"].rpartition("/")[2]], value, defs)
    if "anyOf" in schema or "discriminator" in schema:
        return any(takes(branch, value, defs) for branch in schema.get("anyOf") or schema["oneOf"])
    if "const" in schema or "enum" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return any(value is choice or (type(value) is type(choice) and value == choice) for choice in choices)
    kind = schema.get("type")
    if kind is None:
        return True
    if not isinstance(value, _KINDS[kind]) or (isinstance(value, bool) and kind != "boolean"):
        return False
    if kind == "array":
        items = schema.get("items", {})
        return len(value) >= schema.get("minItems", 0) and all(takes(items, item, defs) for item in value)
    if kind == "object":
        return not set(schema.get("required", ())) - set(value)
    if kind == "string":
        return len(value) >= schema.get("minLength", 0) and bool(re.search(schema.get("pattern", ""), value))
    if kind not in {"integer", "number"}:
        return True
    low, high = schema.get("minimum", -math.inf), schema.get("maximum", math.inf)
    above, below = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
    return bool(low <= value <= high and above < value < below)


def excluded(schema: dict[str, Any], defs: dict[str, Any] | None = None) -> list[Any]:
    """Values that the schema does not allow."""
    found = list(VALUES)
    for branch in schema.get("anyOf", [schema]):
        step = 1 if branch.get("type") == "integer" else 1e-9
        if "minimum" in branch:
            found.append(branch["minimum"] - step)
        if "maximum" in branch:
            found.append(branch["maximum"] + step * max(1, branch["maximum"]))
        found += [branch[bound] for bound in ("exclusiveMinimum", "exclusiveMaximum") if bound in branch]
        if branch.get("items", {}).get("type") in ("integer", "number"):
            found += [[value] for value in excluded(branch["items"], defs)]
    # an integer that no column holds is no JSON here: 400
    found = [value for value in found if not (isinstance(value, int) and value >= 2**63)]
    return [value for value in found if not takes(schema, value, defs)]
