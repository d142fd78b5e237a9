"""Structured logs: one JSON object a line on standard error, with secrets taken out."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal, cast

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

_SECRET_NAME = re.compile(r"authorization|api[-_]?key|token|secret|password|passwd|cookie|credential", re.IGNORECASE)
_API_KEY = re.compile(r"\b(?:rw_[A-Za-z0-9]+_[A-Za-z0-9_-]+|whsec_[A-Za-z0-9+/=]+)")  # of webhooks: what signs
_URL_PASSWORD = re.compile(r"(?P<head>[a-z][a-z0-9+.-]*://[^\s:/@]*:)[^\s/@]+(?=@)", re.IGNORECASE)
REDACTED = "[redacted]"
_HANDLER_NAME = "rankwise"


def redact(value: Any) -> Any:
    """`value` without API keys and passwords in URLs, and without the values of fields that are named as secrets."""
    if isinstance(value, str):
        return _URL_PASSWORD.sub(rf"\g<head>{REDACTED}", _API_KEY.sub(REDACTED, value))
    if isinstance(value, Mapping):
        return {
            key: REDACTED if isinstance(key, str) and _SECRET_NAME.search(key) and item is not None else redact(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    return value


def redact_event(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """A structlog processor: `redact` on the whole event."""
    return cast(EventDict, redact(event))


def configure_logging(level: str = "info", style: Literal["json", "console"] = "json") -> None:
    """Send structlog and the standard library's logging to one handler. Calling it again replaces that handler."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ExtraAdder(),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared[:-1],
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    renderers: list[Processor] = (
        [structlog.processors.format_exc_info, redact_event, structlog.processors.JSONRenderer()]
        if style == "json"
        else [redact_event, structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.set_name(_HANDLER_NAME)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    for old in [item for item in root.handlers if item.get_name() == _HANDLER_NAME]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    _calm_libraries()


def _calm_libraries() -> None:
    """Our access log replaces uvicorn's; the multipart parser logs what the client already gets as a problem."""
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    access = logging.getLogger("uvicorn.access")
    access.handlers.clear()
    access.propagate = False
    for name in ("python_multipart", "alembic", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
