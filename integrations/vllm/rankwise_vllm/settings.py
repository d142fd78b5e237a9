"""What the environment says: which service, with which key, and where adapters are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of the plugin.

    Attributes:
        server: RANKWISE_SERVER, the address of the service.
        api_key: RANKWISE_API_KEY; "" where the service asks for none.
        cache: RANKWISE_VLLM_CACHE, a folder; ~/.cache/rankwise-vllm unless it is set.
        base_model: RANKWISE_VLLM_BASE_MODEL, what adapters call the base model that vLLM runs; as vLLM's --model unless
            it is set.
    """

    server: str
    cache: Path
    api_key: str = field(default="", repr=False)
    base_model: str = ""

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Settings | None:
        """None when no service is named. Raises ValueError: it is no http address."""
        server = environment.get("RANKWISE_SERVER", "").strip().rstrip("/")
        if not server:
            return None
        parts = urlsplit(server)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError("RANKWISE_SERVER must be an address such as https://rankwise.example")
        cache = environment.get("RANKWISE_VLLM_CACHE", "").strip()
        return cls(
            server=server,
            cache=Path(cache).expanduser() if cache else Path.home() / ".cache" / "rankwise-vllm",
            api_key=environment.get("RANKWISE_API_KEY", "").strip(),
            base_model=environment.get("RANKWISE_VLLM_BASE_MODEL", "").strip(),
        )
