"""Which configuration keys exist, what they take in words, and which one a wrong name meant."""

import difflib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipeline.config import Config
from pipeline.config_yaml import show_value
from pipeline.trl_keys import REFUSED, settable_keys

TRL_SECTIONS = tuple(REFUSED)
_LEAST_LIKENESS = 0.62  # of two names, in [0, 1]
_NOUNS = {bool: "true or false", int: "int", float: "float", str: "string", type(None): "null"}
_LIMITS = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}


class KeyDescription(NamedTuple):
    """One configuration key, for the manual."""

    key: str
    """Dotted key, for example `prune.sparsity`."""
    type: str
    """In words, for example `float >= 0 and < 1`."""
    default: str
    """As YAML."""
    docstring: str
    """Meaning and unit, on one line."""


def describe_keys() -> list[KeyDescription]:
    """Describes every key of our own, in the order of the sections; TRL's keys are TRL's."""
    return [
        KeyDescription(
            key,
            describe_type(field),
            show_value(field.get_default(call_default_factory=True)),
            " ".join((field.description or "").split()),
        )
        for key, field in own_fields().items()
    ]


def own_fields() -> dict[str, FieldInfo]:
    """Maps the dotted name of every key of our own to its pydantic field."""
    return dict(_leaves(Config, ""))


def is_section(field: FieldInfo) -> bool:
    """Whether a field holds further keys."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def _leaves(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    """Dotted names and fields that hold a value."""
    for name, field in model.model_fields.items():
        if is_section(field):
            yield from _leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def describe_type(field: FieldInfo) -> str:
    """Says what a field takes: type, limits and whether null is allowed."""
    text = _type_words(field.annotation)
    limits = [
        f"{sign} {getattr(limit, attribute)}"
        for limit in field.metadata
        for kind, (sign, attribute) in _LIMITS.items()
        if isinstance(limit, kind)
    ]
    first, *null = text.split(" or null")
    text = " ".join([first, " and ".join(limits)]).strip() + (" or null" if null else "")
    return f"non-empty {text}" if any(isinstance(part, MinLen) for part in field.metadata) else text


def _type_words(annotation: Any) -> str:
    """An annotation in words, without limits."""
    if annotation in _NOUNS:
        return _NOUNS[annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, arguments))
    if get_origin(annotation) is Annotated:
        return _type_words(arguments[0])
    if get_origin(annotation) is list:
        return f"list of {_type_words(arguments[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    return " or ".join(_type_words(argument) for argument in arguments)


def choices(annotation: Any) -> tuple[str, ...]:
    """Lists the words that an annotation, or an item of its list, may be; () if any."""
    if get_origin(annotation) is Literal:
        return tuple(map(str, get_args(annotation)))
    return choices(get_args(annotation)[0]) if get_origin(annotation) is list else ()


def nearest_keys(key: str) -> list[str]:
    """Finds the valid keys most like a wrong one.

    Args:
        key: A dotted key, a section, or a bare name such as `sparsity`.

    Returns:
        At most two dotted keys, the nearest one in the key's own section first, then one of another
        section if its name is nearer still; or one section.
    """
    section, _, name = key.rpartition(".")
    if not section and (near := difflib.get_close_matches(key, Config.model_fields, n=1)):
        return near
    keys = list(own_fields())
    keys += [f"{part}.{trl_key}" for part in TRL_SECTIONS for trl_key in settable_keys(part)]
    own = [candidate for candidate in keys if candidate.rpartition(".")[0] == section]
    found: list[str] = []
    least = _LEAST_LIKENESS
    for candidates in (own, keys):
        likeness = {candidate: _likeness(name, candidate) for candidate in candidates}
        best = max(likeness, key=likeness.__getitem__, default=None)
        if best is not None and likeness[best] >= least and best not in found:
            found.append(best)
            least = likeness[best] + 1e-9  # another section must be strictly nearer
    return found


def _likeness(name: str, candidate: str) -> float:
    """Likeness in [0, 1] of a name and the last part of a dotted key."""
    return difflib.SequenceMatcher(None, name, candidate.rpartition(".")[2]).ratio()
