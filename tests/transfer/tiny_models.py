"""Two random base models of different families, with different tokenizers and vocabularies, and adapters for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from train.quiet import peft_deprecations_ignored

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CORPUS = [
    f"Please ship {number} blue mugs to Anna in Lima. yes no\nHere are 10 examples: Message Code"
    for number in range(30)
]
ALPHABET = "".join(map(chr, range(32, 127))) + "\nZ\u00fcrich \u2603"
WORDS = ("mugs", "hats", "cups", "pens", "bags", "toys", "lids", "keys")


def write_tokenizer(directory: Path, size: int) -> int:
    """Byte-level BPE of the bytes of `ALPHABET`, with so many tokens at most if they are more: 1 is one token a byte.

    Returns how many there are.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<end>"],
        show_progress=False,
    )
    core.train_from_iterator([ALPHABET, *CORPUS], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return core.get_vocab_size()


def write_llama(
    directory: Path, *, seed: int = 0, vocabulary: int = 400, layers: int = 2, max_positions: int = 512
) -> Path:
    """A random Llama."""
    size = write_tokenizer(directory, vocabulary)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_positions,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def write_gemma(directory: Path, *, seed: int = 1, vocabulary: int = 1) -> Path:
    """A random Gemma 3 with one layer that attends to a window; its table of words has rows that no token has."""
    size = write_tokenizer(directory, vocabulary)
    config = Gemma3TextConfig(
        vocab_size=size + 7,
        hidden_size=40,
        intermediate_size=56,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,  # its row would be 0, and with it the logit of the end, for the head is tied
        initializer_range=0.3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Gemma3ForCausalLM(config).save_pretrained(directory)
    return directory


def write_adapter(
    base: Path,
    directory: Path,
    *,
    seed: int = 0,
    size: float = 0.1,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    **options: Any,
) -> Path:
    """A random LoRA of rank 4 that changes what the base says."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(), peft_deprecations_ignored():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=list(targets), **options)
        wrapped = get_peft_model(model, config)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(0, size)
        wrapped.save_pretrained(directory)
    return directory


def load(directory: Path) -> tuple[Any, Any]:
    """The model, for evaluation, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(directory)


def load_adapted(base: Path, *adapters: Path) -> tuple[Any, Any]:
    """The model with adapters on it, called a0, a1 …; a0 is active."""
    from peft import PeftModel

    model, tokenizer = load(base)
    with peft_deprecations_ignored():
        for number, adapter in enumerate(adapters):
            if number == 0:
                model = PeftModel.from_pretrained(model, str(adapter), adapter_name="a0")
            else:
                model.load_adapter(str(adapter), adapter_name=f"a{number}")
    return model.eval(), tokenizer


def order(number: int) -> tuple[str, str]:
    """An input of the tiny task and its answer: the first letter of what is ordered."""
    word = WORDS[number % len(WORDS)]
    return f"ship {number % 9 + 1} {word}", f" {word[0]}"


def teach_lists(directory: Path, *, steps: int = 120) -> Path:
    """Train all weights of a base on numbered lists of orders, so that it goes on with one."""
    model, tokenizer = load(directory)
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for _ in range(steps):
            numbers = torch.randint(0, 72, (8, 6)).tolist()
            texts = [
                "".join(f"{place}. {order(number)[0]}\n" for place, number in enumerate(row, 1)) for row in numbers
            ]
            batch = tokenizer(texts, return_tensors="pt", padding=True)
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            optimizer.zero_grad()
            model(**batch, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    model.save_pretrained(directory)
    return directory
