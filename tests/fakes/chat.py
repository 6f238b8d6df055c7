"""Conversations for tests: a tokenizer with the special tokens of the templates in `templates/`, and turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from softshard.sources.documents import Turn

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|fin|>"),
)


def chat_backend(model: Path) -> Any:
    """The tokenizer of the tiny model with the special tokens of all templates, and tokens that are not special."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    backend = AutoTokenizer.from_pretrained(model)
    backend.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": list(SPECIAL)})
    backend.add_tokens([AddedToken("<think>"), AddedToken("</think>")])
    return backend


def turns(*words: str, system: str | None = None, last: bool = False) -> list[Turn]:
    """Turns of a user and an assistant, whose answers are labels; with `last` only the last of them."""
    opening = [] if system is None else [Turn(role="system", text=system)]
    said = [
        Turn(role="assistant", text=text, answer=not last or index >= len(words) - 1)
        if index % 2
        else Turn(role="user", text=text)
        for index, text in enumerate(words)
    ]
    return [*opening, *said]
