"""The job file: read once at the edge, and what is wrong named with its line and key.

In: a path to YAML. Out: a frozen `Job`, or `JobInvalid`. Paths in it are relative to the folder in which the command
runs.
"""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from softshard.config import Job, SourceSettings
from softshard.errors import JobInvalid
from softshard.storage.location import OUTPUT_FORMS, find_store_kind
from softshard.telemetry.redaction import without_credentials

if TYPE_CHECKING:
    import yaml

__all__ = ["load_job", "parse_job", "parse_values"]

# A value in an error is shown in part: a few lines of YAML aliases can stand for gigabytes of it.
_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxstring, _shown.maxother = 3, 200, 200


def load_job(path: str | Path, *, check_paths: bool = True) -> Job:
    """Read and check a job file.

    With `check_paths`, local sources and model folders must be there; without it, the job may be one that has run.

    Raises:
        JobInvalid: the file cannot be read, is not YAML, or a value is unknown, missing, of the wrong type, outside
            its range or impossible beside another; the message names the line and the key of every one.
    """
    file = str(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise JobInvalid(file=file, place="", problem=f"cannot be read: {error.strerror}") from error
    return parse_job(content, file=file, check_paths=check_paths)


def parse_job(text: bytes, *, file: str, check_paths: bool = True) -> Job:
    """A job file's content, checked as `load_job` does; `file` is its name for errors. Raises JobInvalid."""
    root, content = _read_yaml(text, file)
    _refuse_duplicate_keys(root, file)
    try:
        job = Job.model_validate(content)
    except ValidationError as error:
        found = sorted(_place_and_problem(root, dict(item)) for item in error.errors(include_url=False))
        (_, place, problem), *rest = found
        tail = "".join(f"; {later}: {other}" for _, later, other in rest)
        raise JobInvalid(file=file, place=place, problem=without_credentials(problem + tail)) from None
    _refuse_impossible(job, root, file)
    if check_paths:
        _refuse_missing_paths(job, root, file)
    return job


def parse_values(text: bytes) -> dict[str, Any] | None:
    """The plain values of a job file, not checked: another version may have written it.

    None where the file is not a YAML mapping that has a `name`.
    """
    import yaml

    try:
        values = yaml.safe_load(text)
    except (UnicodeDecodeError, RecursionError, yaml.YAMLError):
        return None
    return values if isinstance(values, dict) and isinstance(values.get("name"), str) else None


def _read_yaml(text: bytes, file: str) -> tuple[yaml.Node | None, dict[str, Any]]:
    import yaml

    try:
        decoded = text.decode()
        root = yaml.compose(decoded, Loader=yaml.SafeLoader)
        content = yaml.safe_load(decoded)
    except UnicodeDecodeError as error:
        raise JobInvalid(file=file, place="", problem=f"is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise JobInvalid(file=file, place="", problem="is not a job: it is nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise JobInvalid(file=file, place=place, problem=f"is not YAML: {problem}") from error
    if not isinstance(content, dict):
        raise JobInvalid(
            file=file, place="line 1", problem="must be a mapping with the keys name, out, corpus, teacher"
        )
    return root, content


def _refuse_impossible(job: Job, root: yaml.Node | None, file: str) -> None:
    def refuse(problem: str, *location: str | int) -> None:
        raise JobInvalid(file=file, place=_place(root, location), problem=problem)

    if job.target.kind == "threshold" and job.target.tau < 2**-15:
        refuse("must be at least 1/32768; use `kind: full` to store everything", "target", "tau")
    if "://" in job.out and find_store_kind(job.out) is None:
        refuse(f"must be {OUTPUT_FORMS}", "out")
    if job.train.revision is not None and job.train.model is None:
        refuse("has no `train.model` that it could be a revision of", "train", "revision")
    shown, room = job.evaluate.prompt_tokens + job.evaluate.sample_tokens, job.corpus.context_tokens
    if shown > room:
        problem = (
            f"with prompt_tokens makes {shown}, more than context_tokens ({room}): human text would be cut shorter"
        )
        refuse(problem, "evaluate", "sample_tokens")


def _refuse_missing_paths(job: Job, root: yaml.Node | None, file: str) -> None:
    retention = () if job.train.retention is None else job.train.retention.sources
    places: list[tuple[SourceSettings, tuple[str | int, ...]]] = [
        *((source, ("corpus", "sources", index)) for index, source in enumerate(job.corpus.sources)),
        *((source, ("train", "retention", "sources", index)) for index, source in enumerate(retention)),
    ]
    for source, location in places:
        if source.hub is None and "://" not in source.uri and not _is_there(source.uri):
            problem = f"{source.uri}: no such file or folder"
            raise JobInvalid(file=file, place=_place(root, (*location, "uri")), problem=problem)
    for section, model in (("teacher", job.teacher.model), ("train", job.train.model)):
        if model is not None and _is_path(model) and not Path(model).expanduser().is_dir():
            raise JobInvalid(file=file, place=_place(root, (section, "model")), problem=f"{model}: no such folder")


def _is_there(uri: str) -> bool:
    import glob

    return Path(uri).exists() or bool(glob.glob(uri, recursive=True))


def _is_path(model: str) -> bool:
    """Whether a model's name can only be a folder: the hub's names are `name` or `owner/name`."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def _place_and_problem(root: yaml.Node | None, item: dict[str, Any]) -> tuple[int, str, str]:
    location = tuple(part for part in item["loc"] if part not in {"threshold", "topk", "nucleus", "full"})
    kind, message = item["type"], item["msg"]
    if kind == "extra_forbidden":
        message = "unknown key"
    elif kind == "missing":
        message = "is missing"
    elif kind == "value_error":
        message = str(item["ctx"]["error"])
    elif kind == "union_tag_not_found":
        message = "needs a `kind`: threshold, topk, nucleus or full"
    else:
        message = f"{message[0].lower()}{message[1:]}, not {_shown.repr(item['input'])}"
    return _line(root, location), _place(root, location), message


def _place(root: yaml.Node | None, location: tuple[str | int, ...]) -> str:
    """`line 7, corpus.sources[0].license`, the line of the deepest key that is there."""
    dotted = ""
    for part in location:
        dotted += f"[{part}]" if isinstance(part, int) else f".{part}" if dotted else part
    line = f"line {_line(root, location)}"
    return f"{line}, {dotted}" if dotted else line


def _line(root: yaml.Node | None, location: tuple[str | int, ...]) -> int:
    import yaml

    node, line = root, 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            place = next(((key, value) for key, value in node.value if key.value == part), None)
            if place is None:
                break
            line, node = place[0].start_mark.line + 1, place[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _refuse_duplicate_keys(node: yaml.Node | None, file: str, prefix: str = "", known: set[int] | None = None) -> None:
    import yaml

    # Aliases name a node many times over, and a few lines of aliases of aliases more often than could ever be walked.
    known = set() if known is None else known
    if id(node) in known:
        return
    known.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                problem = f"the key is given twice (first on line {seen[key.value]})"
                raise JobInvalid(file=file, place=f"line {line}, {prefix}{key.value}", problem=problem)
            seen[key.value] = line
            _refuse_duplicate_keys(value, file, f"{prefix}{key.value}.", known)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _refuse_duplicate_keys(value, file, f"{prefix.rstrip('.')}[{index}].", known)
