"""Reads job files. Everything that reads one does it here, and errors name the line and the key.

Paths in a job file are relative to the folder in which the command runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from softshard.config import Job, SourceSettings
from softshard.config.problems import Problem, find_problems
from softshard.errors import JobInvalid
from softshard.sources.formats import find_remedy
from softshard.storage import did_you_mean
from softshard.telemetry.redaction import without_credentials

if TYPE_CHECKING:
    import yaml

__all__ = ["load_job", "parse_job", "parse_values"]


def load_job(path: str | Path, *, check_paths: bool = True) -> Job:
    """Read and check a job file.

    With `check_paths`, local sources and model folders must exist; leave it out to read the job of an earlier run.

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
    """Check the content of a job file as `load_job` does; `file` is its name in errors. Raises JobInvalid."""
    root, content = _read_yaml(text, file)
    _refuse_duplicate_keys(root, file)
    try:
        job = Job.model_validate(content)
    except ValidationError as error:
        problems = find_problems(error.errors(include_url=False), settings=Job)
        found = sorted({_placed(root, problem) for problem in problems})
        (_, place, problem), *rest = found
        tail = "".join(f"; {later}: {other}" for _, later, other in rest)
        raise JobInvalid(file=file, place=place, problem=without_credentials(problem + tail)) from None
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
        if source.format == "auto" and (remedy := find_remedy(source.uri)) is not None:
            problem = f"{source.uri}: `format: auto` does not read it: {remedy}"
            raise JobInvalid(file=file, place=_place(root, (*location, "uri")), problem=problem)
    for section, model in (("teacher", job.teacher.model), ("train", job.train.model)):
        if model is not None and _is_path(model) and not Path(model).expanduser().is_dir():
            problem = f"{model}: no such folder{did_you_mean(model)}"
            raise JobInvalid(file=file, place=_place(root, (section, "model")), problem=problem)


def _is_there(uri: str) -> bool:
    import glob

    return Path(uri).exists() or bool(glob.glob(uri, recursive=True))


def _is_path(model: str) -> bool:
    """Whether a model's name can only be a folder: names on the hub are `name` or `owner/name`."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def _placed(root: yaml.Node | None, problem: Problem) -> tuple[int, str, str]:
    """Line, place and text of a problem."""
    keys = (*_keys(root, problem.location), *problem.below)
    return _line(root, keys), _place(root, keys), problem.text


def _keys(root: yaml.Node | None, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """A location in the file, without the names of types that pydantic adds where a value may be of several."""
    keys: list[str | int] = []
    node = root
    for part in location:
        found = _below(node, part)
        if found is not None or _may_hold_more(node):
            keys.append(part)
            node = None if found is None else found[1]
    return tuple(keys)


def _may_hold_more(node: yaml.Node | None) -> bool:
    """Whether keys may come from elsewhere: by a merge (`<<`), or because the node itself is not known."""
    return node is None or (isinstance(node.value, list) and _below(node, "<<") is not None)


def _place(root: yaml.Node | None, location: tuple[str | int, ...]) -> str:
    """`line 7, corpus.sources[0].license`, the line of the deepest key that is there; no line where none is."""
    dotted = ""
    for part in location:
        dotted += f"[{part}]" if isinstance(part, int) else f".{part}" if dotted else part
    line = _line(root, location)
    return ", ".join(([f"line {line}"] if line else []) + ([dotted] if dotted else []))


def _line(root: yaml.Node | None, location: tuple[str | int, ...]) -> int:
    """Line of the deepest key of a location that the file has; 0 where it has none of them."""
    node, line = root, 0
    for part in location:
        found = _below(node, part)
        if found is None:
            break
        line, node = found
    return line


def _below(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    """Line and value of a key of a mapping, or of an item of a list; None where the node has none such."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        return next(((key.start_mark.line + 1, value) for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None


def _refuse_duplicate_keys(node: yaml.Node | None, file: str, prefix: str = "", known: set[int] | None = None) -> None:
    import yaml

    # Aliases of aliases can repeat a node more often than could ever be visited, so each is visited once.
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
