"""Renders a conversation with a chat template: token ids, and which of them are labels.

The ids are those of transformers' `apply_chat_template`. Labels are the tokens of the answers, each with the token
that ends it. Where the template marks answers with `{% generation %}`, the marks say where they are. Else an answer is
what the rendering of the turns up to it adds to that of the turns before it with the beginning of an answer; the whole
rendering must begin with both, up to the end of the answer, or the conversation is refused.

What a person writes is text: where it spells a special token, it is tokenised as its letters.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from softshard.errors import ChatTemplateInvalid, ConversationRefused
from softshard.models import Tokenizer
from softshard.sources.documents import Turn

__all__ = ["ChatTemplate", "Rendering", "load_chat_template"]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_FIRST_STAND_IN = 0xF0000
"""The first of the characters that Unicode keeps for private use, in a plane that no font of note uses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendering:
    """A conversation in tokens."""

    token_ids: NDArray[np.int32]
    """[L]"""
    label_spans: tuple[tuple[int, int], ...]
    """The answers, as runs of tokens in rising order, one for each turn that is an answer."""


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """The text of a chat template, and the tokenizer that it is for."""

    text: str
    tokenizer: Tokenizer

    def render(self, turns: Sequence[Turn]) -> Rendering:
        """The whole conversation, of which the turns that are answers are labels.

        Raises:
            ConversationRefused: the template raises an error or changes an answer; or without marks it is not clear
                where an answer is, as with a template that rewrites earlier turns.
        """
        plain, spellings = self._with_stand_ins(turns)
        text, spans = self._render_marked(plain) if _MARKS.search(self.text) else self._render_prefixes(plain)
        answers = [(index, turn) for index, turn in enumerate(plain, start=1) if turn.answer]
        for (start, stop), (number, turn) in zip(spans, answers, strict=True):
            if turn.text.strip() not in text[start:stop]:
                raise ConversationRefused(f"the chat template changes the text of turn {number}")
        ids, begins, ends = self._tokenise(text, spellings)
        labels = []
        for start, stop in ((_shifted(text, place, spellings) for place in span) for span in spans):
            (inside,) = np.nonzero((ends > start) & (begins < stop))
            labels.append((max(1, int(inside[0])), int(inside[-1]) + 1))
        return Rendering(token_ids=ids, label_spans=tuple(labels))

    def _render_marked(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the answers in it, by the marks of the template."""
        text, marked = self._apply(turns, marks=True)
        assistant = [turn for turn in turns if turn.role == "assistant"]
        if len(marked) != len(assistant):
            problem = f"the chat template marks {len(marked)} answers with generation, and there are {len(assistant)}"
            raise ConversationRefused(problem)
        return text, [span for span, turn in zip(marked, assistant, strict=True) if turn.answer]

    def _render_prefixes(self, turns: Sequence[Turn]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the answers in it, each as the difference of two of its beginnings."""
        text, _ = self._apply(turns)
        spans = []
        for index, turn in enumerate(turns):
            if not turn.answer:
                continue
            before, after = self._around(turns, index)
            if not after.startswith(before):
                raise ConversationRefused(
                    f"the chat template renders turn {index + 1} with another beginning than it gives the model to"
                    " answer from (add_generation_prompt); set another `corpus.chat_template`"
                )
            # A template may close the last turn in another way, as with an end-of-text token.
            common = after[: _common_length(text, after)]
            length = self._answer_length(common[len(before) :], turn.text.strip(), is_whole=common == after)
            if length is None and turn.text.strip() not in after[len(before) :]:
                raise ConversationRefused(f"the chat template changes the text of turn {index + 1}")
            if length is None:
                raise ConversationRefused(
                    f"the chat template renders turn {index + 1} in another way once more turns follow, so the whole is"
                    " not what the model sees and says there; set the source's `answers: last`"
                )
            spans.append((len(before), len(before) + length))
        return text, spans

    def _around(self, turns: Sequence[Turn], index: int) -> tuple[str, str]:
        """The text of the turns before an answer, with the beginning of an answer, and that of the turns up to it."""
        is_asked = any(turn.role == "user" for turn in turns[:index])
        try:
            before, after = self._apply(turns[:index], opens_answer=True)[0], self._apply(turns[: index + 1])[0]
        except ConversationRefused as error:
            if is_asked:
                raise
            before, after, cause = " ", "", error.reason
        else:
            cause = "the chat template has no place for that"
        if not is_asked and not after.startswith(before):
            raise ConversationRefused(f"turn {index + 1} answers before any question, and {cause}")
        return before, after

    def _answer_length(self, added: str, answer: str, *, is_whole: bool) -> int | None:
        """Length of an answer and the token that ends it, at the beginning of what a template adds for it.

        None: the answer is not there. Where no token ends it, all that is added is the answer if it is known whole.
        """
        place = added.rfind(answer)
        while place >= 0:
            if (ending := self._ending.match(added, place + len(answer))) is not None:
                return ending.end()
            place = added.rfind(answer, 0, place + len(answer) - 1)
        return len(added) if is_whole and answer in added else None

    def _apply(
        self, turns: Sequence[Turn], *, opens_answer: bool = False, marks: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        """The template's text for some turns, and the spans that it marks."""
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), marked = render_jinja_template(
                conversations=[[{"role": turn.role, "content": turn.text} for turn in turns]],
                chat_template=self.text,
                return_assistant_tokens_mask=marks,
                add_generation_prompt=opens_answer,
                # The day on which a corpus is made changes nothing in it: a template takes its own default.
                strftime_now=jinja2.Undefined(name="strftime_now"),
                **self.tokenizer.backend.special_tokens_map,
            )
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateInvalid(problem=f"line {error.lineno}: {error.message}") from error
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError) as error:
            raise ConversationRefused(f"the chat template refuses it: {error}") from error
        return text, [tuple(span) for span in marked[0]] if marks else []

    def _tokenise(
        self, text: str, spellings: dict[str, str]
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Ids of a text, and the places where each token begins and ends; stand-ins become what they stand for."""
        ids, offsets = self.tokenizer.encode_rendered(text)
        if spellings:
            if self._piecewise(text, {})[0] != ids:
                listed = ", ".join(spellings.values())
                problem = f"it spells {listed}, and this tokenizer cannot tell that from its own special token there"
                raise ConversationRefused(problem)
            ids, offsets = self._piecewise(text, spellings)
        ends = np.maximum.accumulate(np.array([stop for _, stop in offsets], np.int64))
        begins = np.array([start for start, _ in offsets], np.int64)
        return np.array(ids, np.int32), begins, ends

    def _piecewise(self, text: str, spellings: dict[str, str]) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, from the special tokens of the template and the text between them; stand-ins are replaced."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        place = 0
        for index, piece in enumerate(self._special.split(text)):
            spelt = piece if index % 2 else _restored(piece, spellings)
            if spelt:
                own, spans = self.tokenizer.encode_rendered(spelt, special=bool(index % 2))
                ids += own
                offsets += [(start + place, stop + place) for start, stop in spans]
            place += len(spelt)
        return ids, offsets

    def _with_stand_ins(self, turns: Sequence[Turn]) -> tuple[list[Turn], dict[str, str]]:
        """The turns with one character in place of each special token that they spell, and what these stand for."""
        spelt = sorted({found for turn in turns for found in self._special.findall(turn.text)})
        taken = set("".join(turn.text for turn in turns)) if spelt else set()
        free = (chr(code) for code in range(_FIRST_STAND_IN, 0xFFFFE) if chr(code) not in taken)
        stand_ins = dict(zip(spelt, free, strict=False))
        plain = [
            Turn(role=turn.role, text=self._special.sub(lambda m: stand_ins[m[0]], turn.text), answer=turn.answer)
            for turn in turns
        ]
        return plain, {stand_in: token for token, stand_in in stand_ins.items()}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """Each special token, as a group."""
        return _any_of(token.content for token in self.tokenizer.backend.added_tokens_decoder.values() if token.special)

    @cached_property
    def _ending(self) -> re.Pattern[str]:
        """White space and an added token."""
        added = _any_of(token.content for token in self.tokenizer.backend.added_tokens_decoder.values())
        return re.compile(rf"\s*{added.pattern}")


def _any_of(tokens: Any) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"((?!))")


def _restored(text: str, spellings: dict[str, str]) -> str:
    for stand_in, token in spellings.items():
        text = text.replace(stand_in, token)
    return text


def _shifted(text: str, place: int, spellings: dict[str, str]) -> int:
    """The place in the text without stand-ins of a place in the text with them."""
    return len(_restored(text[:place], spellings))


def _common_length(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def load_chat_template(tokenizer: Tokenizer, *, chosen: str | None = None) -> ChatTemplate:
    """The chat template of a job, or of the tokenizer.

    Args:
        tokenizer: of the model.
        chosen: the text of a template, or the path of a file that holds it; None: the tokenizer's own.

    Raises:
        ChatTemplateInvalid: there is none, the file cannot be read, or it is not a Jinja template.
    """
    if chosen is None:
        try:
            text = tokenizer.backend.get_chat_template()
        except ValueError as error:
            raise ChatTemplateInvalid(problem="the tokenizer of the model has none") from error
    elif "{" in chosen or "\n" in chosen:
        text = chosen
    else:
        try:
            text = Path(chosen).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ChatTemplateInvalid(problem=f"{chosen}: cannot be read: {error}") from error
    template = ChatTemplate(text=text, tokenizer=tokenizer)
    with contextlib.suppress(ConversationRefused):
        template.render(())
    return template
