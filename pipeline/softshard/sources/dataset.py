"""Reads Hugging Face `datasets`: a name on the hub or a local folder, streamed into raw documents.

A folder may hold data files (Parquet, JSON Lines, CSV, ...) or a data set written by `save_to_disk`. The library
decides how much is in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from softshard.errors import SourceUnreadable
from softshard.sources.conversations import check_conversation_columns, find_layout, make_conversation
from softshard.sources.documents import RawDocument, Source, check_columns, make_document
from softshard.storage import InputFile, list_inputs, network_errors, source_failure

__all__ = ["list_dataset", "read_dataset"]


def list_dataset(source: Source) -> list[InputFile]:
    """Files of a data set: those of the local folder, or those on the hub, with the commit as their version.

    Raises:
        SourceUnreadable: there is no such data set.
        SourceUnavailable: the hub cannot be reached for now.
    """
    if Path(source.uri).is_dir():
        return list_inputs(source.uri, source=source.name)
    from datasets import load_dataset_builder

    with _named_errors(source):
        builder = load_dataset_builder(source.uri, **_configuration(source))
    files: list[InputFile] = []
    for names in (builder.config.data_files or {}).values():
        for name, origin in zip(names, names.origin_metadata, strict=True):
            files.append(InputFile(uri=str(name), size=None, version=repr(origin)))
    return sorted(files, key=lambda file: file.uri) or [InputFile(uri=source.uri, size=None, version=str(builder.hash))]


def read_dataset(source: Source, *, max_document_bytes: int) -> Iterator[RawDocument]:
    """One document per row of the source's split.

    Raises:
        SourceUnreadable: there is no such data set, split or column, or a file of it cannot be read.
        SourceUnavailable: the hub cannot be reached for now.
    """
    with _named_errors(source):
        rows = _open(source)
        if rows.column_names is not None:
            rows = rows.select_columns(_fields(source, rows.column_names))
        for number, row in enumerate(rows, start=1):
            _fields(source, list(row))
            name = f"{source.uri}, {source.split}, row {number}"
            group = row[source.group_field] if source.group_field is not None else None
            limit = max_document_bytes
            if find_layout(source, row) == "text":
                yield make_document(
                    row[source.text_field], group=group, name=name, source=source, max_document_bytes=limit
                )
            else:
                yield make_conversation(row, group=group, name=name, source=source, max_document_bytes=limit)


def _fields(source: Source, present: list[str]) -> list[str]:
    """The fields to read: of text or conversation, and of the group. Raises SourceUnreadable: one is not there."""
    group = [] if source.group_field is None else [source.group_field]
    if find_layout(source, present) == "text":
        check_columns([source.text_field, *group], present, source=source, uri=source.uri)
        return [source.text_field, *group]
    fields = check_conversation_columns(source, present, uri=source.uri)
    check_columns(group, present, source=source, uri=source.uri)
    return list(dict.fromkeys([*fields, *group]))


def _configuration(source: Source) -> dict[str, str]:
    """How `datasets` is told the configuration."""
    return {} if source.configuration is None else {"name": source.configuration}


def _open(source: Source) -> Any:
    from datasets import Dataset, load_dataset, load_from_disk

    folder = Path(source.uri)
    if not any((folder / mark).is_file() for mark in ("state.json", "dataset_dict.json")):
        return load_dataset(source.uri, split=source.split, streaming=True, **_configuration(source))
    saved = load_from_disk(source.uri)
    splits = [str(saved.split or source.split)] if isinstance(saved, Dataset) else list(saved)
    if source.split not in splits:
        problem = f"has no split {source.split!r}; its splits are {', '.join(splits)}"
        raise SourceUnreadable(source=source.name, uri=source.uri, problem=problem)
    return saved if isinstance(saved, Dataset) else saved[source.split]


@contextlib.contextmanager
def _named_errors(source: Source) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    try:
        yield
    except network_errors(OSError, ValueError, DatasetsError, pa.ArrowException) as error:
        problem = "`datasets` cannot read it"
        if "Config name is missing" in str(error):
            problem = "has several configurations, so set `configuration` to one of them"
        raise source_failure(error, source=source.name, uri=source.uri, problem=problem) from error
