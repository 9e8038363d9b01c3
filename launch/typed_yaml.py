"""A YAML file into a dataclass, or one message that names what is wrong with it."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.config_yaml import YamlError, parse_yaml
from pipeline.errors import UserError

Kind = TypeVar("Kind")


def read_typed(path: Path, kind: type[Kind], content: str) -> Kind:
    """Reads the file of `--config`.

    Args:
        path: The file.
        kind: Dataclass of what it holds.
        content: What to call that in a message.

    Raises:
        UserError: It cannot be read, or a key is missing, unknown, twice there or of the wrong
            type.
    """
    try:
        values, duplicates = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, YamlError) as error:
        raise UserError(f"--config: {path}: {error}; set a YAML file of {content}") from error
    if duplicates:
        raise UserError(f"--config: {path}: {'; '.join(duplicates)}")
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError(f"--config: {path}: {'; '.join(faults)}") from error
