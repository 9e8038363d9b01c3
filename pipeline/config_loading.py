"""From a YAML file and dotted overrides to a checked `Config`, and back.

All faults are reported together. To see faults between keys although some keys are faulty by
themselves, faulty keys fall back to their defaults before the rules run, and a rule that reads such
a key is skipped. Neither torch nor trl is imported, so a mistake shows at once.

Left out: what TRL's config classes check when they are built, and whether models and tasks exist.
"""

import copy
import difflib
import re
from pathlib import Path
from typing import Any, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pipeline.config import Config, ConfigError
from pipeline.config_keys import (
    TRL_SECTIONS,
    choices,
    describe_type,
    is_section,
    nearest_keys,
    own_fields,
)
from pipeline.config_yaml import YamlError, dump_yaml, parse_yaml, show_value
from pipeline.rules.check import cross_faults
from pipeline.rules.fault import Fault
from pipeline.trl_keys import REFUSED, SECRETS, settable_keys, trl_value_fault


def load_config(path: str | Path | None, overrides: dict[str, Any]) -> Config:
    """Reads and checks a configuration.

    Args:
        path: YAML file; None starts from the defaults.
        overrides: Dotted key to value, for example `{"prune.sparsity": 0.7}`; they win over the
            file.

    Returns:
        The configuration, every key filled.

    Raises:
        ConfigError: Anything is wrong; the message has one line per fault.
    """
    values, lines = ({}, []) if path is None else _read_file(Path(path))
    faults = _merge(values, overrides)
    faults += _sift(values, Config, ())
    config, value_faults = _validate(values)
    faults += value_faults
    faulty = {key.split("[")[0] for fault in faults for key in (fault.key, *fault.also)}
    faults += [fault for fault in cross_faults(config) if not _reads(fault, faulty)]
    lines += [_line(fault) for fault in faults]
    if lines:
        sources = [] if path is None else [f"--config {path}"]
        sources += ["the command line"] if overrides else []
        count = "1 fault" if len(lines) == 1 else f"{len(lines)} faults"
        raise ConfigError(
            f"{count} in {' and '.join(sources)}\n" + "\n".join(f"  {line}" for line in lines)
        )
    return config


def to_yaml(config: Config) -> str:
    """Writes a configuration so that `load_config` reads back an equal one."""
    return dump_yaml(config.model_dump())


def _reads(fault: Fault, faulty: set[str]) -> bool:
    """Whether a rule read a key, or a key of a section, that is faulty by itself."""
    return any(
        key == bad or key.startswith(f"{bad}.")
        for key in (fault.key, *fault.also)
        for bad in faulty
    )


def _read_file(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """The mapping in a YAML file, and one line per key given twice."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        siblings = [str(file) for file in path.parent.glob("*.yaml")]
        near = difflib.get_close_matches(str(path), siblings, n=1)
        remedy = f"give {near[0] if near else 'a YAML file'} instead"
        raise ConfigError(f"--config: {path}: no such file; {remedy}") from None
    except OSError as error:
        remedy = "give a YAML file that can be read instead"
        raise ConfigError(f"--config: {path}: {error.strerror}; {remedy}") from None
    except ValueError:  # bytes that are not UTF-8, or a path with a null byte
        raise ConfigError(f"--config: {path}: not text; give a YAML file instead") from None
    try:
        values, duplicates = parse_yaml(text)
    except YamlError as error:
        raise ConfigError(f"--config: {path}: {error}; mend the YAML there") from None
    if not isinstance(values, dict):
        found = "holds nothing" if values is None else f"{show_value(values)} is no section"
        remedy = "write sections such as 'prune: {sparsity: 0.9}' instead"
        raise ConfigError(f"--config: {path}: {found}; {remedy}")
    return values, duplicates


def _merge(values: dict[Any, Any], overrides: dict[str, Any]) -> list[Fault]:
    """Writes dotted overrides into nested values, in place; an empty section becomes {}."""
    for section, content in values.items():
        if content is None and section in Config.model_fields:
            values[section] = {}
    faults = []
    for key, value in overrides.items():
        *sections, name = key.split(".")
        place: Any = values
        for section in sections:
            place = place.setdefault(section, {}) if isinstance(place, dict) else None
        if isinstance(place, dict):
            place[name] = copy.deepcopy(value)
        else:
            faults.append(Fault(key, value, f"{'.'.join(sections)} holds no keys", "leave it out"))
    return faults


def _sift(values: dict[Any, Any], model: type[BaseModel], path: tuple[str, ...]) -> list[Fault]:
    """Takes unknown, refused and TRL-invalid keys out of nested values, in place."""
    faults = []
    for name, value in list(values.items()):
        fault, here = None, (*path, str(name))
        field = model.model_fields.get(name)
        if field and is_section(field) and isinstance(value, dict):
            faults += _sift(value, field.annotation, here)
        elif field and is_section(field):
            fault = Fault(".".join(here), value, "not keys with values", f"write {name}.KEY: VALUE")
        elif not field and len(path) == 1 and path[0] in TRL_SECTIONS:
            fault = _trl_fault(path[0], name, value)
        elif not field:
            fault = _unknown(".".join(here), value)
        if fault:
            faults.append(fault)
            del values[name]
    return faults


def _trl_fault(section: str, name: Any, value: Any) -> Fault | None:
    """What is wrong with a key that is not ours in a section that takes TRL's."""
    key = f"{section}.{name}"
    if name in REFUSED[section]:
        why, remedy = REFUSED[section][name]
        return Fault(key, value, f"the pipeline owns this key: {why}", remedy)
    if name not in settable_keys(section):
        return _unknown(key, value)
    found = trl_value_fault(section, name, value)
    return Fault(key, value, *found) if found else None


def _unknown(key: str, value: Any) -> Fault:
    """A key that does not exist, with the nearest ones that do."""
    near = nearest_keys(key)
    remedy = f"set {' or '.join(near)} instead" if near else "--help lists the keys"
    return Fault(key, value, "unknown key", remedy, tuple(near))


def _validate(values: dict[str, Any]) -> tuple[Config, list[Fault]]:
    """Builds a config from known keys; those with a wrong value keep their default."""
    try:
        return Config.model_validate(values), []
    except ValidationError as error:
        details = error.errors(include_url=False)
    for detail in details:
        *sections, name = _names(detail)
        place = values
        for section in sections:
            place = place[section]
        place.pop(name, None)
    return Config.model_validate(values), [_value_fault(detail) for detail in details]


def _names(detail: ErrorDetails) -> tuple[str, ...]:
    """Names that lead to the field of a pydantic error, without positions in a list."""
    return tuple(part for part in detail["loc"] if isinstance(part, str))


def _value_fault(detail: ErrorDetails) -> Fault:
    """A pydantic error in our words."""
    fields, names = own_fields(), _names(detail)
    key = next(k for n in range(len(names), 0, -1) if (k := ".".join(names[:n])) in fields)
    inside = detail["loc"][key.count(".") + 1 :]
    index = "".join(f"[{part}]" for part in inside)
    field, value = fields[key], detail["input"]
    why = re.sub(r"^\w+ should ", "must ", detail["msg"])
    near = difflib.get_close_matches(str(value), choices(field.annotation), n=1)
    if near and get_origin(field.annotation) is list and not inside:
        near = [f"[{near[0]}]"]
    remedy = f"set {near[0] if near else describe_type(field)} instead"
    return Fault(key + index, value, why, detail.get("ctx", {}).get("remedy", remedy))


def _line(fault: Fault) -> str:
    """A fault as `key: value: why; remedy`."""
    secret = fault.key.rpartition(".")[2] in SECRETS
    value = "(not shown)" if secret else show_value(fault.value)
    return f"{fault.key}: {value}: {fault.why}; {fault.remedy}"
