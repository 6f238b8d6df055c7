"""What is wrong in a job file, in words: pydantic's errors as problems, each with the place of its key.

Pydantic reports each member of a union that a value might be, and calls a list too short whose items it has dropped as
wrong. Here there is one problem for each mistake. Words of Python are left out, and an unknown key is compared with
those that there are.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from pydantic import BaseModel

from softshard.config.base import KeyInvalid, Settings

__all__ = ["Location", "Problem", "find_problems"]

Location = tuple[str | int, ...]

# Values in errors are shortened: a few lines of YAML aliases can expand to gigabytes.
_shown = reprlib.Repr()
_shown.maxlevel, _shown.maxstring, _shown.maxother = 3, 200, 200
_PLAIN = {None: "null", True: "true", False: "false"}

_KINDS = {
    "tuple_type": "a list",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a section with keys",
}
"""What a value should be, by the kind of error."""
_SECTION = {"model_type", "model_attributes_type"}
_SYNONYMS = {
    "lr": ("learning_rate", "learning_rates"),
    "batch_size": ("batch_tokens",),
    "num_epochs": ("epochs",),
    "max_length": ("context_tokens",),
    "max_seq_length": ("context_tokens",),
    "seq_length": ("context_tokens",),
    "stride": ("overlap_tokens",),
    "val_fraction": ("holdout_fraction",),
    "test_fraction": ("holdout_fraction",),
    "path": ("uri",),
    "file": ("uri",),
    "url": ("uri",),
    "author_field": ("group_field",),
    "output": ("out",),
    "output_dir": ("out",),
    "r": ("rank",),
    "top_k": ("k",),
    "num_workers": ("workers",),
    "kl_weight": ("weight",),
}
"""Names that other programs give to keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One mistake."""

    location: Location
    """Of the key, with the names of types that pydantic adds where a value may be of several."""
    below: tuple[str, ...]
    """Keys below the location at which the mistake is, which the file need not have."""
    text: str


def find_problems(errors: Sequence[Any], *, settings: type[Settings]) -> list[Problem]:
    """Pydantic's errors about a file of some settings, without those that only repeat another one."""
    places = [tuple(error["loc"]) for error in errors]
    found: list[Problem] = []
    alternatives: dict[Location, list[Any]] = {}
    for error, place in zip(errors, places, strict=True):
        if _is_claim(error) and any(_is_below(other, place) for other in places):
            continue
        if error["type"] in _KINDS or error["type"] == "literal_error":
            alternatives.setdefault(_without_type(place, errors), []).append(error)
        else:
            found.append(_problem(error, settings))
    return found + [_expected(place, same) for place, same in alternatives.items()]


def _is_claim(error: Any) -> bool:
    """Whether an error may be no more than the consequence of another one about an item or a member of a union."""
    return error["type"] == "too_short" or error["type"] in _KINDS or error["type"] == "literal_error"


def _is_below(other: Location, place: Location) -> bool:
    """Whether a place is below another one, where each may end in the name of a type that pydantic tried."""
    above = place[:-1] if _names_type(place) else place
    return len(other) > len(place) and other[: len(above)] == above


def _names_type(place: Location) -> bool:
    """Whether the last part is what pydantic calls a member of a union, and no key: `float`, `literal['a']`."""
    last = place[-1] if place else ""
    return isinstance(last, str) and (last in {"float", "int", "str", "bool", "constrained-float"} or "[" in last)


def _without_type(place: Location, errors: Sequence[Any]) -> Location:
    return place[:-1] if _names_type(place) else place


def _expected(place: Location, errors: Sequence[Any]) -> Problem:
    """The problem of a value that is none of what it may be."""
    wanted = dict.fromkeys(_KINDS.get(error["type"]) or error["ctx"]["expected"] for error in errors)
    text = f"input should be {' or '.join(wanted)}, not {_show(errors[0]['input'])}"
    return Problem(location=place, below=(), text=text)


def _show(value: Any) -> str:
    return _PLAIN[value] if value is None or isinstance(value, bool) else _shown.repr(value)


def _problem(error: Any, settings: type[Settings]) -> Problem:
    kind, location = error["type"], tuple(error["loc"])
    cause = error.get("ctx", {}).get("error")
    below: tuple[str, ...] = ()
    if kind == "missing":
        *section, key = location
        text = f"`{key}` is missing" if section else f"the top-level key `{key}` is missing"
        if isinstance(key, int):
            text = f"item {key + 1} is missing"
        location = tuple(section)
    elif isinstance(cause, KeyInvalid):
        text, below = cause.problem, tuple(cause.key.split("."))
    elif kind == "value_error":
        text = str(cause)
    elif kind == "extra_forbidden":
        text = "unknown key" + _suggestion(location, settings)
    elif kind == "union_tag_invalid":
        text = f"unknown kind {_shown.repr(error['ctx']['tag'])}; the kinds are {error['ctx']['expected_tags']}"
        below = (error["ctx"]["discriminator"].strip("'"),)
    elif kind in _SECTION:
        keys = [f"`{key}`" for key in _keys(_sections(location, settings))][:3]
        text = f"input should be a section with keys such as {', '.join(keys)}, not {_show(error['input'])}"
    elif kind in {"too_short", "too_long"}:
        bound = (
            f"at least {error['ctx']['min_length']}" if kind == "too_short" else f"at most {error['ctx']['max_length']}"
        )
        text = f"input should be a list of {bound} item(s), not {_show(error['input'])}"
    else:
        message = error["msg"]
        text = f"{message[0].lower()}{message[1:]}, not {_show(error['input'])}"
    return Problem(location=location, below=below, text=text)


def _suggestion(location: Location, settings: type[Settings]) -> str:
    """The key that was probably meant: of the section itself, of one below it, or of any other."""
    *above, key = location
    sections = _sections(tuple(above), settings)
    own, names = _keys(sections), [str(key), *_SYNONYMS.get(str(key), ())]
    inside = {path: path.split(".")[-1] for section in sections for path in _paths(section)}
    lasts = [path.split(".")[-1] for path in _paths(settings)]
    anywhere = {path: last for path in _paths(settings) if lasts.count(last := path.split(".")[-1]) == 1}
    prefix = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in above).lstrip(".")
    for name in names[1:]:
        if name in own:
            return f"; did you mean `{name}`?"
    if close := difflib.get_close_matches(str(key), own, n=1, cutoff=0.75):
        return f"; did you mean `{close[0]}`?"
    for name in names:
        for path in (path for path, last in inside.items() if last == name):
            return f"; did you mean `{prefix}{'.' if prefix else ''}{path}`?"
    for name in names:
        for path in (path for path, last in anywhere.items() if last == name):
            return f"; did you mean `{path}`?"
    if close := difflib.get_close_matches(str(key), own, n=1, cutoff=0.5):
        return f"; did you mean `{close[0]}`?"
    return ""


def _keys(sections: Sequence[type[BaseModel]]) -> list[str]:
    keys = dict.fromkeys(key for section in sections for key in section.model_fields)
    return sorted(keys, key=lambda key: key != "kind")


def _sections(location: Location, settings: type[Settings]) -> list[type[BaseModel]]:
    """The settings that the value at a location may be."""
    sections: list[type[BaseModel]] = [settings]
    for part in location:
        if isinstance(part, int):
            continue
        below = [each for section in sections if part in section.model_fields for each in _models(section, part)]
        if below:
            sections = below
        elif tagged := [section for section in sections if _tag(section) == part]:
            sections = tagged
    return sections


def _models(section: type[BaseModel], key: str) -> list[type[BaseModel]]:
    return list(_models_in(section.model_fields[key].annotation))


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


def _tag(section: type[BaseModel]) -> Any:
    kind = section.model_fields.get("kind")
    return None if kind is None else kind.default


def _paths(section: type[BaseModel]) -> Iterator[str]:
    """Paths of all keys of a section and of the sections below it: the nearest first, and those meant most often."""
    level: list[tuple[str, type[BaseModel]]] = [("", section)]
    while level:
        keys = [(f"{prefix}{key}", found, key) for prefix, found in level for key in found.model_fields]
        keys.sort(key=lambda item: (not item[0].startswith("train"), "sweep" in item[0]))
        yield from (path for path, _, _ in keys)
        level = [(f"{path}.", below) for path, found, key in keys for below in _models(found, key)]
