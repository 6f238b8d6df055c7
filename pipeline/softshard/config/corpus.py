"""The sources of a corpus, and how its documents are screened and cut into sequences."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator, model_validator

from softshard.config.base import KeyInvalid, Settings
from softshard.sources.conversations import LAYOUTS
from softshard.sources.encoding import is_utf8
from softshard.sources.formats import FORMATS, describe_endings
from softshard.sources.text import SPLITS
from softshard.storage.location import OUTPUT_FORMS, find_store_kind, find_uri_problem

__all__ = [
    "CorpusSettings",
    "Duplicates",
    "SourceSettings",
    "output_uri",
    "plain_uri",
    "refuse_equal_names",
]

if TYPE_CHECKING:
    FormatName = str
    SplitName = str
    LayoutName = str
else:
    FormatName = Literal["auto", *FORMATS]
    SplitName = Literal[SPLITS]
    LayoutName = Literal[LAYOUTS]


Duplicates = Literal["exact", "spacing", "words"]
"""What makes two documents duplicates, from the strictest."""


class SourceSettings(Settings):
    """One source of documents. A source without a licence and a rights basis is refused."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the source, a value to filter and join by."""
    uri: str = Field(min_length=1)
    """File, folder, glob or fsspec URI; with `format: datasets`, a data set's name or local folder. Of a folder, names
    that begin with `_` or `.` are left out, and so are its README and LICENSE, where it has other files."""
    format: FormatName = Field(default="auto", description=describe_endings())
    encoding: str = "utf-8"
    """Encoding of text and JSON Lines, for example windows-1252; a file that begins with a byte order mark is read by
    that."""
    style: str = Field(min_length=1)
    """Style of the writing, for example academic, conversational, literary, technical."""
    license: str
    """SPDX licence expression, for example CC0-1.0, MIT, CC-BY-4.0, LicenseRef-Owned."""
    rights_basis: Literal["public-domain", "owned", "licensed", "consented"]
    """The right by which the text is used."""
    text_field: str = "text"
    """Field or column that holds the text (JSON Lines, Parquet, datasets)."""
    group_field: str | None = None
    """Field or column that names the author or any other group; without it the group is the source's name. It may be in
    the folders of a file's name: `author=Ada/part.parquet`."""
    drop_texts: tuple[str, ...] = ()
    """Texts that stand for one that is gone, such as "[deleted]" and "[removed]": a document that is one of them is
    left out, and counted as dropped."""
    split_texts: SplitName = "none"
    """Where each text is split into documents: `lines` makes every line one, `blank_lines` ends one at a blank line,
    `headings` begins one at a Markdown heading (`# Title`). Each is named after the line on which it begins."""
    layout: LayoutName = "text"
    """How a row holds its document: `text`, in `text_field`; or a conversation, `messages` (role, content), `sharegpt`
    (conversations: from, value), `alpaca` (instruction, input, output, history), `prompt_completion`. `auto` goes by
    the row's fields, and a row with the text field is text."""
    roles: dict[str, Literal["system", "user", "assistant"]] = Field(default={})
    """Roles by the names that the rows give them, beyond the usual: system, user, human, prompter, assistant, gpt, bot,
    model."""
    answers: str = Field(default="assistant", min_length=1)
    """Who answers in a conversation, and so whose words are learned: `assistant`; `last`, of the assistant's answers
    the last one alone; between two people without roles the `first` or `second` to speak, or `both`, each answering
    the other; or the name of a person."""
    system: str | None = None
    """System prompt of the conversations that have none."""
    consent: tuple[str, ...] = ()
    """Authors, as the group field has them, who agreed that a model is trained to write as they do; their writing here
    is not counted against `train.author_cap`."""
    configuration: str | None = None
    """Configuration of a data set that has several, such as wikitext-2-raw-v1 (`format: datasets` alone)."""
    split: str = "train"
    """Split to read (`format: datasets` alone)."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read at most this many documents, the first ones."""

    @property
    def hub(self) -> str | None:
        """Namespace of the hub that the source is on; None where it is files, also those of a local data set."""
        namespace = getattr(FORMATS.get(self.format), "namespace", None)
        return None if namespace is None or Path(self.uri).exists() else namespace

    @field_validator("uri")
    @classmethod
    def _without_credential(cls, value: str) -> str:
        return plain_uri(value)

    @field_validator("encoding")
    @classmethod
    def _known_encoding(cls, value: str) -> str:
        try:
            is_utf8(value)
        except LookupError:
            raise ValueError(f"{value!r} is not an encoding of text, such as utf-8, windows-1252 or utf-16") from None
        return value

    @field_validator("drop_texts")
    @classmethod
    def _without_space_around(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(text.strip() for text in value)

    @model_validator(mode="after")
    def _whole_conversations(self) -> SourceSettings:
        if self.layout not in ("text", "auto") and self.split_texts != "none":
            raise ValueError("split_texts splits texts, and a conversation is one document; leave it out")
        return self

    @model_validator(mode="after")
    def _named_authors(self) -> SourceSettings:
        if self.consent and self.group_field is None:
            raise ValueError("consent names authors, and without a `group_field` the source has none")
        return self

    @model_validator(mode="after")
    def _configured_data_set(self) -> SourceSettings:
        if self.configuration is not None and self.format != "datasets":
            raise KeyInvalid("configuration", "only a data set has one; set `format: datasets`, or leave it out")
        return self

    @field_validator("license")
    @classmethod
    def _spdx(cls, value: str) -> str:
        from packaging.licenses import InvalidLicenseExpression, canonicalize_license_expression

        try:
            return str(canonicalize_license_expression(value))
        except InvalidLicenseExpression as error:
            problem = f"{value!r} is not an SPDX licence expression, such as CC0-1.0, MIT or LicenseRef-Owned"
            raise ValueError(problem) from error


class CorpusSettings(Settings):
    """How documents become sequences."""

    sources: tuple[SourceSettings, ...] = Field(min_length=1)
    """Where the documents come from."""
    holdout_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of the documents, chosen by a hash of each, on which no teacher and no student is trained; the report needs
    a share above 0."""
    context_tokens: int = Field(default=512, ge=2)
    """Most tokens of a sequence."""
    overlap_tokens: int = Field(default=64, ge=1)
    """Tokens that a window shares with the window before it: context, whose targets are not stored again."""
    chat_template: str | None = None
    """Chat template of conversations, as Jinja text or the path of a file; without it, the tokenizer's own."""
    normalisation: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normalisation."""
    duplicates: Duplicates = "spacing"
    """What makes two documents duplicates, of which the first is kept: `exact`: the same normalised text; `spacing`:
    the same but for white space; `words`: the same but for white space, punctuation and case."""
    near_duplicates: bool = Field(default=False, exclude_if=lambda value: value is False)
    """Leave out a document too that shares most of its runs of five words with an earlier one: half of those that share
    70%, nearly all that share 80%; counted as near_duplicate."""
    max_document_bytes: int = Field(default=64 * 2**20, ge=1)
    """Longest document; a longer one is counted, reported and left out, and is never held in memory."""
    max_left_out: float = Field(default=0.05, ge=0, le=1)
    """Largest share of a source's documents that may be left out because they cannot be decoded or have no text where
    it should be (undecodable, malformed); beyond it, the command ends with 3. Documents that are empty, duplicates, too
    long or in `drop_texts` do not count."""
    sequences_per_part: int = Field(default=256, ge=1)
    """Most sequences of a slice of the corpus, and so of a part. The content of a slice decides where it ends, at half
    of this or later, so that a change in the corpus moves only the cuts next to it."""

    @model_validator(mode="after")
    def _consistent(self) -> CorpusSettings:
        if self.overlap_tokens >= self.context_tokens:
            raise ValueError(
                f"overlap_tokens ({self.overlap_tokens}) must be less than context_tokens ({self.context_tokens})"
            )
        refuse_equal_names(self.sources)
        return self


def refuse_equal_names(sources: tuple[SourceSettings, ...]) -> None:
    """Raise ValueError where two sources have the same name."""
    names = [source.name for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"source names must differ: {', '.join(twice)} is given more than once")


def plain_uri(value: str) -> str:
    """The URI with `~` as the home folder, if it can be written into an output, where others read it.

    Raises:
        ValueError: it holds a credential.
    """
    if (problem := find_uri_problem(value)) is not None:
        raise ValueError(problem)
    return os.path.expanduser(value) if value.startswith("~") else value


def output_uri(value: str) -> str:
    """The folder or bucket of an output, `file://` left out; ValueError where it is of another scheme."""
    path = plain_uri(value.removeprefix("file://"))
    if "://" in path and find_store_kind(path) is None:
        raise ValueError(f"must be {OUTPUT_FORMS}")
    return path
