"""Conversations in rows of JSON Lines, Parquet and data sets: their fields, who speaks, and who answers.

A row goes in as a dict of its fields; out comes a raw document with its turns, or the reason why it cannot be used.
Of a conversation between two people without roles, `answers` says who takes the part of the assistant.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from softshard.errors import SourceUnreadable
from softshard.sources.documents import (
    RawDocument,
    Source,
    Turn,
    Turns,
    check_columns,
    kind_name,
    make_document,
    unusable_document,
)

__all__ = ["LAYOUTS", "check_conversation_columns", "find_layout", "make_conversation"]

_FIELDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("system",)),
    "sharegpt": (("conversations",), ("system",)),
    "alpaca": (("instruction", "output"), ("input", "history", "system")),
    "prompt_completion": (("prompt", "completion"), ("system",)),
}
"""By layout: the fields that a row must have, and those that it may have."""
LAYOUTS = ("text", *_FIELDS, "auto")
"""The layouts of a row."""

_ROLES = {
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "model"), "assistant"),
}
_PLACES = ("first", "second", "both")


class _Unusable(ValueError):
    """A row that is no conversation, with the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Message:
    """A message as the row has it."""

    place: str
    """Where it is in the row, for reasons."""
    speaker: str | None
    text: str
    may_answer: bool = True


def check_conversation_columns(source: Source, present: Sequence[str], *, uri: str) -> list[str]:
    """The columns of a table that its conversations are read from.

    Raises:
        SourceUnreadable: the table lacks the columns of the source's layout, or of all of them for `auto`.
    """
    layout = find_layout(source, present)
    if layout is None:
        listed = ", ".join("/".join(required) for required, _ in _FIELDS.values())
        problem = f"has no column {source.text_field!r}, nor those of a conversation ({listed})"
        raise SourceUnreadable(source=source.name, uri=uri, problem=f"{problem}; its columns are {', '.join(present)}")
    required, optional = _FIELDS[layout]
    check_columns(required, present, source=source, uri=uri)
    return [*required, *(field for field in optional if field in present)]


def find_layout(source: Source, present: Iterable[str]) -> str | None:
    """The layout of a row or table with these fields: the source's, or for `auto` the first whose fields are there.

    A row with the source's text field is text. None: no layout fits.
    """
    if source.layout != "auto":
        return source.layout
    fields = set(present)
    if source.text_field in fields:
        return "text"
    return next((layout for layout, (required, _) in _FIELDS.items() if fields.issuperset(required)), None)


def make_conversation(
    row: Mapping[str, Any], *, group: object, name: str, source: Source, max_document_bytes: int
) -> RawDocument:
    """A raw document from the fields of a row. Its text is what the row says, each turn after the speaker's name."""
    try:
        layout = find_layout(source, row)
        if layout is None:
            raise _Unusable(f"has no field {source.text_field!r}, and the fields of no conversation")
        messages = _read_messages(row, layout)
        system, turns = _take_system(messages, row, source)
        views = _views(turns, source)
    except _Unusable as error:
        return unusable_document(name=name, source=source, problem="malformed", reason=str(error))
    if any(message.text.strip() in source.drop_texts for message in messages):
        return unusable_document(name=name, source=source, problem="dropped")
    spoken = [] if system is None else [("system", system)]
    spoken += [(speaker, message.text) for speaker, message in turns]
    text = "\n\n".join(f"{speaker}: {said}" for speaker, said in spoken)
    document = make_document(text, group=group, name=name, source=source, max_document_bytes=max_document_bytes)
    prompt = source.system if system is None else system
    opening = () if prompt is None else (Turn(role="system", text=prompt),)
    return document if document.text is None else replace(document, views=tuple((*opening, *view) for view in views))


def _read_messages(row: Mapping[str, Any], layout: str) -> list[_Message]:
    for field in _FIELDS[layout][0]:
        if row.get(field) is None:
            raise _Unusable(f"has no field {field!r}")
    if layout == "alpaca":
        return _read_alpaca(row)
    if layout == "prompt_completion":
        prompt = _read_side(row["prompt"], "prompt", "user")
        # An answer within the prompt is what was said before, and not what is to be learned.
        return [replace(m, may_answer=False) for m in prompt] + _read_side(row["completion"], "completion", "assistant")
    return _read_list(row[_FIELDS[layout][0][0]], _FIELDS[layout][0][0])


def _read_alpaca(row: Mapping[str, Any]) -> list[_Message]:
    messages = []
    for number, pair in enumerate(row.get("history") or (), start=1):
        place = f"pair {number} of 'history'"
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise _Unusable(f"{place} is not a list of a question and its answer")
        messages += [_said(text, place, role) for text, role in zip(pair, ("user", "assistant"), strict=True)]
    instruction, addition = _said(row["instruction"], "'instruction'", "user"), row.get("input")
    if addition is not None and not isinstance(addition, str):
        raise _Unusable(f"'input' holds {kind_name(addition)}, not text")
    if addition and addition.strip():
        instruction = replace(instruction, text=f"{instruction.text}\n{addition}")
    return [*messages, instruction, _said(row["output"], "'output'", "assistant")]


def _read_side(value: object, field: str, role: str) -> list[_Message]:
    return _read_list(value, field) if isinstance(value, list | tuple) else [_said(value, repr(field), role)]


def _read_list(value: object, field: str) -> list[_Message]:
    if not isinstance(value, list | tuple):
        raise _Unusable(f"its field {field!r} holds {kind_name(value)}, not a list of messages")
    if not value:
        raise _Unusable(f"its field {field!r} holds no message")
    return [_read_message(message, f"message {n} of {field!r}") for n, message in enumerate(value, start=1)]


def _read_message(value: object, place: str) -> _Message:
    """A message: an object with `role` and `content`, or `from` and `value`; or the text alone."""
    if isinstance(value, str):
        return _said(value, place, None)
    if not isinstance(value, dict):
        raise _Unusable(f"{place} is {kind_name(value)}, not an object with role and content")
    if value.get("tool_calls"):
        raise _Unusable(f"{place} calls tools, and only text is read")
    speaker = next((value[key] for key in ("role", "from") if value.get(key) is not None), None)
    if speaker is not None and not isinstance(speaker, str):
        raise _Unusable(f"{place} has {kind_name(speaker)} as its role, not text")
    content = next((value[key] for key in ("content", "value") if value.get(key) is not None), None)
    may_answer = value.get("weight") != 0 and value.get("train") is not False
    return replace(_said(_join_parts(content, place), place, speaker), may_answer=may_answer)


def _join_parts(content: object, place: str) -> object:
    """The text of a content that is a list of parts; any other content as it is."""
    if not isinstance(content, list | tuple):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else kind_name(part)
            raise _Unusable(f"{place} has a part of the kind {kind!r}, and only text is read")
    return "".join(part["text"] for part in content)


def _said(text: object, place: str, speaker: str | None) -> _Message:
    if text is not None and not isinstance(text, str):
        raise _Unusable(f"{place} holds {kind_name(text)}, not text")
    if not (text and text.replace("\x00", "").strip()) and (speaker is None or _role(speaker, {}) != "system"):
        raise _Unusable(f"{place}{f' ({speaker})' if speaker else ''} is empty")
    return _Message(place=place, speaker=speaker, text=text or "")


def _role(speaker: str, roles: Mapping[str, str]) -> str | None:
    return roles.get(speaker) or _ROLES.get(speaker.strip().casefold())


def _take_system(
    messages: list[_Message], row: Mapping[str, Any], source: Source
) -> tuple[str | None, list[tuple[str, _Message]]]:
    """The row's system prompt, and the other messages with who says them.

    The prompt is the first message, else the row's field; an empty one is none.
    """
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise _Unusable(f"its field 'system' holds {kind_name(system)}, not text")
    turns = []
    for index, (speaker, message) in enumerate(zip(_speakers(messages, source), messages, strict=True)):
        if speaker != "system":
            turns.append((speaker, message))
        elif index:
            raise _Unusable(f"{message.place} is a system prompt, which can only come first")
        else:
            system = message.text
    return system if system and system.strip() else None, turns


def _speakers(messages: list[_Message], source: Source) -> list[str]:
    """Who says each message: a role, or with `answers` between people their names, or their places in turn."""
    nameless = [message for message in messages if message.speaker is None]
    if source.answers in _PLACES and len(nameless) == len(messages):
        return ["second" if index % 2 else "first" for index in range(len(messages))]
    if nameless:
        raise _Unusable(f"{nameless[0].place} has no role; between two people set `answers` to first, second or both")
    speakers = [cast("str", message.speaker) for message in messages]
    if source.answers not in ("assistant", "last"):
        return ["system" if _role(speaker, source.roles) == "system" else speaker for speaker in speakers]
    roles = [_role(speaker, source.roles) for speaker in speakers]
    for role, message in zip(roles, messages, strict=True):
        if role is None:
            raise _Unusable(
                f"{message.place} has the unknown role {message.speaker!r}; name it in the source's `roles`"
            )
    return cast("list[str]", roles)


def _views(turns: list[tuple[str, _Message]], source: Source) -> list[Turns]:
    """The turns as user and assistant, once for each person who answers."""
    if source.answers in ("assistant", "last"):
        view = _as_roles(turns, assistant="assistant")
        answers = [index for index, turn in enumerate(view) if turn.answer]
        if not answers:
            raise _Unusable("has no answer: no message that may be learned is the assistant's")
        if source.answers == "last":
            view = tuple(replace(turn, answer=index == answers[-1]) for index, turn in enumerate(view))
        return [view]
    names = list(dict.fromkeys(speaker for speaker, _ in turns))
    if source.answers not in _PLACES:
        chosen = [source.answers]
    elif len(names) > 2:
        raise _Unusable(f"has {len(names)} people ({', '.join(names)}), and `answers: {source.answers}` is for two")
    else:
        chosen = {"first": names[:1], "second": names[1:], "both": names}[source.answers]
    views = [view for view in (_view(turns, name) for name in chosen) if view]
    if not views:
        raise _Unusable(f"has no answer: `answers` is {source.answers}, and only {', '.join(names)} speaks")
    return views


def _view(turns: list[tuple[str, _Message]], name: str) -> Turns:
    """The turns with one person as the assistant, from the other's first words on; empty without an answer.

    What this person says before that answers nothing.
    """
    begin = next((index for index, (speaker, _) in enumerate(turns) if speaker != name), len(turns))
    view = _as_roles(turns[begin:], assistant=name)
    return view if any(turn.answer for turn in view) else ()


def _as_roles(turns: list[tuple[str, _Message]], *, assistant: str) -> Turns:
    return tuple(
        Turn(role="assistant", text=message.text, answer=message.may_answer)
        if speaker == assistant
        else Turn(role="user", text=message.text)
        for speaker, message in turns
    )
