"""The job file: read once at the edge, and what is wrong named with its line and key.

In: a path to YAML. Out: a frozen `Job`, or `JobInvalid`. Paths in it are relative to the folder in which the command
runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from softshard.config import Job, SourceSettings
from softshard.errors import JobInvalid

if TYPE_CHECKING:
    import yaml

__all__ = ["load_job"]


def load_job(path: str | Path, *, check_paths: bool = True) -> Job:
    """Read and check a job file.

    With `check_paths`, local sources and model folders must be there; without it, the job may be one that has run.

    Raises:
        JobInvalid: the file cannot be read, is not YAML, or a value is unknown, missing, of the wrong type, outside
            its range or impossible beside another; the message names the line and the key of every one.
    """
    import yaml

    file = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise JobInvalid(file=file, place="", problem=f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise JobInvalid(file=file, place="", problem=f"is not UTF-8 at byte {error.start}") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise JobInvalid(file=file, place=place, problem=f"is not YAML: {problem}") from error
    if not isinstance(content, dict):
        raise JobInvalid(
            file=file, place="line 1", problem="must be a mapping with the keys name, out, corpus, teacher"
        )
    _refuse_duplicate_keys(root, file)
    try:
        job = Job.model_validate(content)
    except ValidationError as error:
        found = sorted(_place_and_problem(root, dict(item)) for item in error.errors(include_url=False))
        (_, place, problem), *rest = found
        tail = "".join(f"; {later}: {other}" for _, later, other in rest)
        raise JobInvalid(file=file, place=place, problem=problem + tail) from error
    _refuse_impossible(job, root, file)
    if check_paths:
        _refuse_missing_paths(job, root, file)
    return job


def _refuse_impossible(job: Job, root: yaml.Node | None, file: str) -> None:
    def refuse(problem: str, *location: str | int) -> None:
        raise JobInvalid(file=file, place=_place(root, location), problem=problem)

    if job.target.kind == "threshold" and job.target.tau < 2**-15:
        refuse("must be at least 1/32768; use `kind: full` to store everything", "target", "tau")
    if "://" in job.out:
        refuse("must be a local folder in this version", "out")
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
        if source.format != "datasets" and "://" not in source.uri and not _is_there(source.uri):
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
        message = f"{message[0].lower()}{message[1:]}, not {item['input']!r}"
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


def _refuse_duplicate_keys(node: yaml.Node | None, file: str, prefix: str = "") -> None:
    import yaml

    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen:
                problem = f"the key is given twice (first on line {seen[key.value]})"
                raise JobInvalid(file=file, place=f"line {line}, {prefix}{key.value}", problem=problem)
            seen[key.value] = line
            _refuse_duplicate_keys(value, file, f"{prefix}{key.value}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _refuse_duplicate_keys(value, file, f"{prefix.rstrip('.')}[{index}].")
