"""The page of a transfer's report: whole, without scripts, every text of others escaped."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from app.cli.transferring import read_seeds
from app.transfer_page import page

HOSTILE = "<script>alert(1)</script>\"'&"
TRANSFER: dict[str, Any] = {
    "adapter": "adp_1",
    "adapter_name": HOSTILE,
    "method": "trans-lora",
    "new_adapter": None,
    "degraded": True,
    "waiting": False,
    "decision": {"decision": "discard", "at": "2026-01-01T00:00:00Z", "reason": HOSTILE},
}
RATE = {"rate": 0.5, "low": 0.25, "high": 0.75}
REPORT: dict[str, Any] = {
    "method": "trans-lora",
    "verdict": "hold",
    "bases": {"source": {"name": HOSTILE}, "target": {"name": "t"}},
    "inputs": {"filter": "discriminator", "acceptance": RATE, "acceptance_at_zero": None, "screening": {"passed": 7}},
    "evaluation": {
        "arms": {
            "source": {"score": RATE, "items": 20},
            "copy": {"applicable": False, "reason": HOSTILE},
        }
    },
    "gate": {"reason": HOSTILE, "negative_flips": 3, "epsilon": 0.02, "lead": 0.1, "low": -0.2, "high": 0.4},
}


class Tags(HTMLParser):
    """Collects tags, and keeps count of those that are open."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onload", "onclick"}
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_escapes_what_others_wrote() -> None:
    text = page(TRANSFER, REPORT, [(1, {"loss": 2.0}), (2, {"loss": 1.0})])
    tags = Tags()
    tags.feed(text)
    tags.close()
    assert tags.open == []
    assert "script" not in tags.seen
    assert tags.seen.count("svg") == 4  # scores, gate, acceptance, loss
    assert text.count("&lt;script&gt;") >= 5
    assert "Negative flips: 3" in text


def test_the_gate_is_drawn_to_scale() -> None:
    text = page(TRANSFER, {**REPORT, "gate": {**REPORT["gate"], "low": -1.0, "high": 1.0, "lead": 0.0}}, [])
    assert '<line class="span" x1="190.0" x2="660.0"' in text
    assert 'cx="425.0"' in text


def test_without_anything_measured_it_says_so() -> None:
    assert "nothing to measure with" in page(TRANSFER, {"verdict": "hold"}, [])


@pytest.mark.parametrize(("text", "found"), [("a b\n\n c\n", ["a b", " c"]), (' ["a", "b\\nc"]', ["a", "b\nc"])])
def test_seeds_are_read_from_lines_or_json(tmp_path: Any, text: str, found: list[str]) -> None:
    path = tmp_path / "seeds"
    path.write_text(text, encoding="utf-8")
    assert read_seeds(path) == found


@pytest.mark.parametrize("data", [b"[1]", b'["CANARY"', b"\xff\xfe"])
def test_what_holds_no_seeds_is_refused_without_its_text(tmp_path: Any, data: bytes) -> None:
    import typer

    path = tmp_path / "seeds"
    path.write_bytes(data)
    with pytest.raises(typer.BadParameter) as refused:
        read_seeds(path)
    assert "CANARY" not in str(refused.value)
