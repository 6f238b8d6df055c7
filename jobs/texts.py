"""The texts of the demo and of the benchmarks: what their packages hold, as documents that a job can read.

In: the content of a data set, parsed. Out: documents {text, id, group} in an order that depends on nothing but that
content. Who wrote or said what is known by short hashes alone.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = [
    "Document",
    "Turns",
    "conversation_documents",
    "edited_documents",
    "speech_documents",
    "topic_documents",
]

Document = dict[str, str]
Turns = Sequence[Sequence[Mapping[str, str]]]
"""A conversation: turns by speakers in alternation, each of messages {text, sender}."""


def topic_documents(topics: Mapping[str, str], *, min_characters: int = 600) -> list[Document]:
    """Topics as documents {text, id, group}, by name, without the rows of stars and dashes that underline headings."""
    documents = []
    for name in sorted(topics):
        kept = [
            line.rstrip() for line in topics[name].splitlines() if not re.fullmatch(r"\s*([*=\-~^])\1{2,}\s*", line)
        ]
        text = "\n".join(kept).strip()
        if len(text) >= min_characters:
            documents.append({"text": text, "id": name, "group": "pydoc"})
    return documents


def speech_documents(rows: Iterable[Mapping[str, str]], *, min_characters: int = 1000) -> list[Document]:
    """Speeches as documents {text, id, group}, in the order of the rows, without the short ones.

    A row has `text`, `parlspeech_row`, which becomes the id, and `speaker`, whose hash becomes the group.
    """
    return [
        {"text": row["text"], "id": row["parlspeech_row"], "group": _pseudonym(row["speaker"])}
        for row in rows
        if len(row["text"]) >= min_characters
    ]


def edited_documents(files: Mapping[str, str]) -> list[Document]:
    """Samples of the Brown corpus as documents {text, id, group}, by name, without their tags.

    A file has a sentence a line, each word followed by / and its tag, and an empty line before a paragraph. What comes
    out is set as it was in print: headings apart, marks at the words and within quotation marks. Sentences with a
    symbol that the corpus could not write are left out. A sample is by one author, and so is its own group.
    """
    documents = []
    for name in sorted(files):
        paragraphs = [
            _as_in_print(sentences)
            for block in re.split(r"\n\s*\n", files[name])
            for sentences in _headings_apart(block.splitlines())
        ]
        text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        documents.append({"text": text, "id": name, "group": name})
    return documents


_LOST_SYMBOL = "**"
_MARKS = (
    # A sentence that ends within a quotation has its mark twice.
    (r"([?!;:.]) (?=\1(?: |$))", ""),
    ("`` ?", "\u201c"),
    (r" ?''", "\u201d"),
    (r" (?=[,.;:?!)\]](?:[ ,.;:?!)\]\u201d]|$))", ""),
    (r"(?<=[(\[]) ", ""),
    # The corpus has all quotations end before the mark, American print after it.
    (r"(?<=[.?!])\u201d\.", "\u201d"),
    (r"\u201d([,.?!])", "\\1\u201d"),
)


def _headings_apart(lines: Iterable[str]) -> Iterator[list[str]]:
    """Sentences in groups: a heading's, whose tags all end in -hl, or those of a paragraph."""
    for _, group in itertools.groupby(lines, lambda line: all(word.endswith("-hl") for word in line.split())):
        yield [line for line in group if _LOST_SYMBOL not in line]


def _as_in_print(sentences: Iterable[str]) -> str:
    text = " ".join(word.rpartition("/")[0] for sentence in sentences for word in sentence.split())
    for pattern, replacement in _MARKS:
        text = re.sub(pattern, replacement, text)
    return text


def conversation_documents(dataset: Mapping[str, Mapping[str, Turns]]) -> list[Document]:
    """Conversations as documents {text, id, group}, ordered by id.

    The text has one message a line, with the speaker's mark: `A: ` for who speaks first, `B: ` for the other. The id
    is a hash of the data set's own; the group is a hash of who wrote the most. Left out is what a reader would not
    call a conversation in English: see `_is_fit`.
    """
    documents = []
    for conversation_id, conversation in dataset.items():
        messages = [message for turn in conversation["messages"] for message in _messages(turn)]
        if _is_fit(messages):
            marks = {messages[0][0]: "A"}
            lines = [f"{marks.setdefault(sender, 'B')}: {text}" for sender, text in messages]
            group = _pseudonym(_main_author(messages))
            documents.append({"text": "\n".join(lines), "id": _pseudonym(conversation_id), "group": group})
    return sorted(documents, key=lambda document: document["id"])


_CUT_CHARACTERS = 160
"""The data set's chat window ended a message at 175 characters; its writer went on in the next one."""
_COMMON_WORD = re.compile(
    r"\b(a|all|and|are|as|at|be|but|can|do|for|have|how|i|if|in|is|it|just|like|me|my|no|not|of|oh|on|or|so|that|the"
    r"|there|they|this|to|was|we|what|with|would|yeah|you|your)\b"
)
_CONTACT = re.compile(r"\S@\S+\.\w|https?:|www\.|\d{3}[-. ]?\d{3}[-. ]?\d{4}")


def _messages(turn: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(sender, text) of one turn: white space made plain, lost emoji removed, messages that were cut put together."""
    joined: list[tuple[str, str]] = []
    goes_on = False
    for message in turn:
        text = " ".join(message["text"].replace("[?]", " ").split()).rstrip("\\ ")
        if not text:
            continue
        if goes_on:
            joined[-1] = (message["sender"], f"{joined[-1][1].removesuffix(' -')} {text}")
        else:
            joined.append((message["sender"], text))
        goes_on = len(text) >= _CUT_CHARACTERS and text[-1] not in ".!?"
    return joined


def _is_fit(messages: Sequence[tuple[str, str]]) -> bool:
    """Whether two people talk, in English, neither too briefly nor for hours, and give nobody's address."""
    texts = [text for _, text in messages]
    whole = " ".join(texts).lower()
    if len(texts) < 12 or not 400 <= len(whole) <= 6000 or _CONTACT.search(whole):
        return False
    shares = Counter(sender for sender, _ in messages)
    return (
        len(shares) == 2
        and min(shares.values()) >= len(texts) / 5
        and len(set(texts)) >= 0.7 * len(texts)
        and len(_COMMON_WORD.findall(whole)) >= 0.22 * len(re.findall(r"[a-z']+", whole))
    )


def _main_author(messages: Sequence[tuple[str, str]]) -> str:
    written: Counter[str] = Counter()
    for sender, text in messages:
        written[sender] += len(text)
    return written.most_common(1)[0][0]


def _pseudonym(identifier: str) -> str:
    return hashlib.blake2b(identifier.encode(), digest_size=6).hexdigest()
