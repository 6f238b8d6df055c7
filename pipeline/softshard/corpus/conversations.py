"""Cuts a conversation into sequences, at its turns.

A sequence is a whole rendering of some turns that follow each other, and ends with its last label. A conversation that
fits is one sequence. Of a longer one, every sequence has the system prompt; the first begins with the first turn, each
other with the question to its first label, and whole turns before that of at most `overlap_tokens` tokens. A sequence
takes as many answers as fit. Where not even the first of them fits, the oldest turns before its question are left out,
and where that is not enough, the answer is. Every answer is a label in one sequence at most, and context in others.

The tokens of the document, in which each sequence has its place, are its sequences one after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from softshard.corpus.render import ChatTemplate, Rendering
from softshard.corpus.screen import ScreenedDocument
from softshard.corpus.windows import make_sequence_id
from softshard.sketch.types import TokenSequence
from softshard.sources.documents import Turns

__all__ = ["conversation_sequences"]


def conversation_sequences(
    document: ScreenedDocument, *, template: ChatTemplate, context_tokens: int, overlap_tokens: int
) -> tuple[list[TokenSequence], int]:
    """The sequences of a conversation, for each person who answers, and how many answers are longer than a sequence.

    Raises:
        ConversationRefused: as `ChatTemplate.render`.
    """
    sequences: list[TokenSequence] = []
    start = num_left_out = 0
    for turns in document.views:
        cutter = _Cutter(turns, template=template, context_tokens=context_tokens, overlap_tokens=overlap_tokens)
        for cut in cutter.cuts():
            sequence_id = make_sequence_id(
                document.document_id,
                tokenizer=template.tokenizer,
                start=start,
                context_tokens=context_tokens,
                overlap_tokens=overlap_tokens,
                rendering=_digest(cut),
            )
            sequences.append(
                TokenSequence(
                    sequence_id=sequence_id,
                    document_id=document.document_id,
                    source=document.source,
                    style=document.style,
                    group=document.group,
                    start=start,
                    token_ids=cut.token_ids,
                    label_spans=cut.label_spans,
                )
            )
            start += len(cut.token_ids)
        num_left_out += cutter.num_left_out
    return sequences, num_left_out


def _digest(rendering: Rendering) -> str:
    digest = hashlib.blake2b(rendering.token_ids.astype("<i4").tobytes(), digest_size=16)
    digest.update(repr(rendering.label_spans).encode())
    return digest.hexdigest()


@dataclass(slots=True)
class _Cutter:
    """Cuts the turns of one view; sizes of turns are estimated, and every sequence is measured before it is taken."""

    turns: Turns
    template: ChatTemplate
    context_tokens: int
    overlap_tokens: int
    num_left_out: int = 0
    """Answers that fit in no sequence, so far."""

    def cuts(self) -> Iterator[Rendering]:
        """Renderings in the order of the conversation, each without what follows its last label."""
        whole = _until_last_label(self.template.render(self.turns))
        if len(whole.token_ids) <= self.context_tokens:
            yield whole
            return
        sizes = self._sizes(len(whole.token_ids))
        answers = [index for index, turn in enumerate(self.turns) if turn.answer]
        while answers:
            is_first = answers[0] == next(index for index, turn in enumerate(self.turns) if turn.answer)
            found = self._longest(answers, sizes, most_before=None if is_first else self.overlap_tokens)
            if found is None:
                self.num_left_out += 1
                answers = answers[1:]
            else:
                rendering, num_answers = found
                yield rendering
                answers = answers[num_answers:]

    def _longest(
        self, answers: Sequence[int], sizes: Sequence[float], *, most_before: int | None
    ) -> tuple[Rendering, int] | None:
        """The sequence that begins with a label for answers[0], and how many answers are labels in it; None: none."""
        begins = self._questions(answers[0])
        for begin in begins:
            own = begin == begins[-1]
            is_far = most_before is not None and sum(sizes[begin : begins[-1]]) > most_before
            if not own and (is_far or self._estimate(begin, answers[0], sizes) > self.context_tokens):
                continue
            shortest = self._render(begin, answers[:1])
            if len(shortest.token_ids) > self.context_tokens:
                continue
            for num in range(len(answers), 1, -1):
                if self._estimate(begin, answers[num - 1], sizes) <= self.context_tokens:
                    longer = self._render(begin, answers[:num])
                    if len(longer.token_ids) <= self.context_tokens:
                        return longer, num
            return shortest, 1
        return None

    def _questions(self, answer: int) -> list[int]:
        """The turns up to an answer that a sequence may begin with: the user's, of several in a row the first."""
        first = self._num_opening
        found = [
            index
            for index in range(first, answer)
            if self.turns[index].role == "user" and (index == first or self.turns[index - 1].role != "user")
        ]
        return found or [first]

    def _render(self, begin: int, answers: Sequence[int]) -> Rendering:
        """The system prompt and the turns from `begin` to the last of the answers, of which these are labels."""
        opening = self._num_opening
        chosen = [replace(turn, answer=index in answers) for index, turn in enumerate(self.turns)]
        return _until_last_label(self.template.render([*chosen[:opening], *chosen[begin : answers[-1] + 1]]))

    def _estimate(self, begin: int, last: int, sizes: Sequence[float]) -> float:
        return sum(sizes[: self._num_opening]) + sum(sizes[begin : last + 1])

    def _sizes(self, num_tokens: int) -> list[float]:
        """Tokens of each turn, with an equal share of what the template adds to all."""
        own = [len(ids) for ids in self.template.tokenizer.encode([turn.text for turn in self.turns])]
        share = max(0.0, (num_tokens - sum(own)) / len(own))
        return [size + share for size in own]

    @property
    def _num_opening(self) -> int:
        return int(self.turns[0].role == "system")


def _until_last_label(rendering: Rendering) -> Rendering:
    stop = rendering.label_spans[-1][1]
    return replace(rendering, token_ids=rendering.token_ids[:stop].copy())
