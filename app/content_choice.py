"""Which of two forms of an answer a client would rather have, by its `Accept` header (RFC 9110, section 12.5.1)."""

from __future__ import annotations

from starlette.requests import Request


def prefers(request: Request, kind: str) -> bool:
    """Whether `Accept` names the media type, or its family, before JSON; without the header, or with `*/*`, JSON is
    meant."""
    best: dict[str, float] = {}
    for item in request.headers.get("accept", "").split(","):
        name, *parameters = (part.strip().lower() for part in item.split(";"))
        quality = next((_number(part[2:]) for part in parameters if part.startswith("q=")), 1.0)
        best[name] = max(quality, best.get(name, 0.0))
    wanted = max(best.get(kind, 0.0), best.get(f"{kind.partition('/')[0]}/*", 0.0))
    return wanted > best.get("application/json", 0.0)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
