"""An adapter in a few lines."""

from __future__ import annotations

from typing import Any

from app.cli.output import moment, size


def summary(adapter: dict[str, Any]) -> dict[str, Any]:
    """The fields of an adapter that a person looks for first, in order."""
    report = adapter.get("report") or {}
    return {
        "id": adapter["id"],
        "name": adapter["name"],
        "description": adapter.get("description"),
        "tags": adapter.get("tags"),
        "method": adapter.get("method"),
        "rank": adapter.get("rank"),
        "alpha": adapter.get("alpha"),
        "ranks": adapter.get("ranks"),
        "base model": adapter.get("base_model"),
        "modules": adapter.get("module_count"),
        "targets": adapter.get("target_modules"),
        "parameters": f"{adapter['parameter_count']:,}" if adapter.get("parameter_count") else None,
        "dtype": adapter.get("dtype"),
        "size": size(adapter.get("size")),
        "mergeable": adapter.get("mergeable"),
        "refusal": adapter.get("refusal"),
        "origin": adapter.get("origin"),
        "fetched from": _source(adapter.get("source")),
        "job": adapter.get("job_id"),
        "weights digest": adapter.get("weights_digest"),
        "created": moment(adapter.get("created_at")),
        "waived": (adapter.get("waiver") or {}).get("reason"),
        "warnings": report.get("warnings"),
        "ignored keys": [f"{item['key']} ({item['reason']})" for item in report.get("ignored") or ()],
        "non-finite": report.get("nonfinite"),
    }


def _source(source: dict[str, Any] | None) -> str | None:
    """Where an adapter was fetched from, in a line."""
    if source is None:
        return None
    if source["kind"] == "hub":
        return f"{source['hub']}/{source['repo']} at {source['revision']}"
    if source["kind"] == "url":
        return str(source["url"])
    return f"s3://{source['bucket']}/{source['key'] or source['prefix']}"
