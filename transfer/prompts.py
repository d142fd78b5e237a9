"""The prompts of a transfer, as text: what the generator continues, what the discriminator is asked, and how a task's
input becomes a prompt. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints, field_validator

from artifacts.errors import FieldError, RequestInvalid
from artifacts.menu import NO_NUL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "{x}"
"""Where a format has the task's input."""
ANNOUNCED = 10
Stop = Literal["line", "item"]

TaskName = Annotated[str, StringConstraints(min_length=1, max_length=200, strip_whitespace=True, pattern=NO_NUL)]
"""Short human name of a task: "boolean expressions"."""


class PromptFormat(BaseModel):
    """How a task's input becomes a prompt. It is stored with the adapter as data: training, labels and evaluation share
    one, and a chat template is that of whichever base model reads it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: Annotated[str, StringConstraints(max_length=20_000, pattern=NO_NUL)] = Field(
        PLACE, description="The prompt, with {x} once, where the input stands."
    )
    chat: StrictBool = Field(
        False, description="The prompt is a user's turn, put through the chat template of the base model's tokenizer."
    )
    system: Annotated[str, StringConstraints(max_length=20_000, pattern=NO_NUL)] | None = Field(
        None, description="A turn of the system before it; with chat only."
    )

    @field_validator("template")
    @classmethod
    def _one_place(cls, value: str) -> str:
        if value.count(PLACE) != 1:
            raise ValueError("needs {x} exactly once")
        return value

    @field_validator("system")
    @classmethod
    def _needs_chat(cls, value: str | None, info: object) -> str | None:
        if value is not None and not getattr(info, "data", {}).get("chat"):
            raise ValueError("only a chat has a system's turn")
        return value

    def fill(self, x: str) -> str:
        """The prompt without a chat template. Braces in `x` stay what they are."""
        return self.template.replace(PLACE, x)

    def messages(self, x: str, answer: str | None = None) -> list[dict[str, str]]:
        """The turns of a chat, ended by the assistant's answer if there is one."""
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        turns.append({"role": "user", "content": self.fill(x)})
        return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]

    def row(self, x: str, answer: str) -> dict[str, object]:
        """A row of the task causal-lm (`train.tasks.causal_rows`), whose loss counts the answer and its end alone."""
        if self.chat:
            return {"messages": self.messages(x, answer)}
        return {"prompt": self.fill(x), "completion": answer}

    def encode(self, x: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The prompt as token ids, just as a training row of it begins.

        Raises:
            RequestInvalid: a chat, and the tokenizer has no chat template.
        """
        if not self.chat:
            return list(tokenizer(self.fill(x))["input_ids"])
        if tokenizer.chat_template is None:
            raise RequestInvalid(
                "The format of prompts is a chat, and the base model's tokenizer has no chat template.",
                hint="Give a format without chat, or a base model that was made for chats.",
                errors=[FieldError("/format/chat", "the base model has no chat template")],
            )
        text = tokenizer.apply_chat_template(self.messages(x), tokenize=False, add_generation_prompt=True)
        return list(tokenizer(str(text), add_special_tokens=False)["input_ids"])


def generator_prompt(seeds: Sequence[str]) -> str:
    """A numbered list that a language model goes on with (arXiv:2405.17258, fig. 7): it announces more items than it
    shows, holds inputs only, and instructs nothing, so that base models without a chat template serve.
    """
    announced = max(ANNOUNCED, 2 * len(seeds))
    lines = [f"Here are {announced} examples:"]
    lines += [f"{number}. {seed}" for number, seed in enumerate(seeds, 1)]
    return "\n".join([*lines, f"{len(seeds) + 1}."])


def stop_of(seeds: Sequence[str]) -> Stop:
    """Where a generated input ends: with its line, unless a seed has several."""
    return "item" if any("\n" in seed for seed in seeds) else "line"


def stop_text(stop: Stop, seeds: int) -> str:
    """The text that ends a generated input, which does not belong to it."""
    return "\n" if stop == "line" else f"\n{seeds + 2}."


def discriminator_prompt(x: str, name: str) -> str:
    """What the discriminator is asked of an input (arXiv:2405.17258, fig. 8), in training and in use alike."""
    return f"Answer in as few words as possible. {x}\nIs the above question from the {name} dataset?"
