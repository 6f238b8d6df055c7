"""Converts the texts of the demo and the benchmarks to documents that a job can read.

In: the parsed content of a dataset. Out: documents {text, id, group} in an order that depends only on that content.
Writers and speakers are identified only by short hashes.
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
"""A conversation: turns of alternating speakers, each a list of messages {text, sender}."""


def topic_documents(topics: Mapping[str, str], *, min_characters: int = 600) -> list[Document]:
    """Topics as documents {text, id, group}, sorted by name, without the rows of symbols that underline headings."""
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
    """Speeches as documents {text, id, group}, in the order of the rows; short ones are left out.

    A row has `text`, `parlspeech_row`, which becomes the id, and `speaker`, whose hash becomes the group.
    """
    return [
        {"text": row["text"], "id": row["parlspeech_row"], "group": _pseudonym(row["speaker"])}
        for row in rows
        if len(row["text"]) >= min_characters
    ]


def edited_documents(files: Mapping[str, str]) -> list[Document]:
    """Samples of the Brown corpus as documents {text, id, group}, sorted by name, without their tags.

    A file has one sentence per line, each word followed by / and its tag, and an empty line before a paragraph. The
    output is set as in print: headings separate, punctuation next to words and inside quotation marks. Sentences with
    a symbol that the corpus could not encode are left out. A sample has one author, so it is its own group.
    """
    documents = []
    for name in sorted(files):
        paragraphs = [
            _as_in_print(sentences)
            for block in re.split(r"\n\s*\n", files[name])
            for sentences in _separate_headings(block.splitlines())
        ]
        text = "\n\n".join(paragraph for paragraph in paragraphs if paragraph)
        documents.append({"text": text, "id": name, "group": name})
    return documents


_LOST_SYMBOL = "**"
_MARKS = (
    # A sentence that ends within a quotation has its final mark twice.
    (r"([?!;:.]) (?=\1(?: |$))", ""),
    ("`` ?", "\u201c"),
    (r" ?''", "\u201d"),
    (r" (?=[,.;:?!)\]](?:[ ,.;:?!)\]\u201d]|$))", ""),
    (r"(?<=[(\[]) ", ""),
    # The corpus closes quotations before the punctuation mark, American print after it.
    (r"(?<=[.?!])\u201d\.", "\u201d"),
    (r"\u201d([,.?!])", "\\1\u201d"),
)


def _separate_headings(lines: Iterable[str]) -> Iterator[list[str]]:
    """Sentences in groups: those of a heading, whose tags all end in -hl, or those of a paragraph."""
    for _, group in itertools.groupby(lines, lambda line: all(word.endswith("-hl") for word in line.split())):
        yield [line for line in group if _LOST_SYMBOL not in line]


def _as_in_print(sentences: Iterable[str]) -> str:
    text = " ".join(word.rpartition("/")[0] for sentence in sentences for word in sentence.split())
    for pattern, replacement in _MARKS:
        text = re.sub(pattern, replacement, text)
    return text


def conversation_documents(dataset: Mapping[str, Mapping[str, Turns]]) -> list[Document]:
    """Conversations as documents {text, id, group}, ordered by id.

    The text has one message per line, prefixed with the speaker: `A: ` for the first, `B: ` for the other. The id is a
    hash of the dataset's id; the group is a hash of the person who wrote most. Conversations that a reader would not
    call a conversation in English are left out: see `_is_usable`.
    """
    documents = []
    for conversation_id, conversation in dataset.items():
        messages = [message for turn in conversation["messages"] for message in _messages(turn)]
        if _is_usable(messages):
            marks = {messages[0][0]: "A"}
            lines = [f"{marks.setdefault(sender, 'B')}: {text}" for sender, text in messages]
            group = _pseudonym(_main_author(messages))
            documents.append({"text": "\n".join(lines), "id": _pseudonym(conversation_id), "group": group})
    return sorted(documents, key=lambda document: document["id"])


_CUT_CHARACTERS = 160
"""The dataset's chat window cut messages at 175 characters; the writer continued in the next message."""
_COMMON_WORD = re.compile(
    r"\b(a|all|and|are|as|at|be|but|can|do|for|have|how|i|if|in|is|it|just|like|me|my|no|not|of|oh|on|or|so|that|the"
    r"|there|they|this|to|was|we|what|with|would|yeah|you|your)\b"
)
_CONTACT = re.compile(r"\S@\S+\.\w|https?:|www\.|\d{3}[-. ]?\d{3}[-. ]?\d{4}")


def _messages(turn: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
    """(sender, text) of one turn: white space normalised, placeholders of emoji removed, cut messages joined."""
    joined: list[tuple[str, str]] = []
    is_cut = False
    for message in turn:
        text = " ".join(message["text"].replace("[?]", " ").split()).rstrip("\\ ")
        if not text:
            continue
        if is_cut:
            joined[-1] = (message["sender"], f"{joined[-1][1].removesuffix(' -')} {text}")
        else:
            joined.append((message["sender"], text))
        is_cut = len(text) >= _CUT_CHARACTERS and text[-1] not in ".!?"
    return joined


def _is_usable(messages: Sequence[tuple[str, str]]) -> bool:
    """Whether two people talk in English, at a reasonable length, without giving anybody's address."""
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
