"""YAML as the configuration reads and writes it: plain scalars by the core schema of YAML 1.2.

PyYAML follows YAML 1.1, where `1e-3` is a string, `no` is false and `010` is 8. Here, as in YAML
1.2.2 section 10.3.2, `1e-3` is a float, only `true` and `false` are booleans and `010` is 10. A key
given twice in one mapping is reported instead of the last one winning. Anchors and the merge key
`<<` work as in YAML 1.1.

Left out: every tag that would make a Python object.
"""

import re
from typing import Any

import yaml

_PREFIX = "tag:yaml.org,2002:"
_SCALARS = (  # tag, form of a plain scalar, characters it can start with ("" is the empty scalar)
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
)


class YamlError(ValueError):
    """Text that is not YAML; `str(error)` says where and why."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that notes keys given twice."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - PyYAML's own class attribute

    def __init__(self, stream: str):
        super().__init__(stream)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        """Composes a mapping and notes the keys that stand in it twice."""
        node = super().compose_mapping_node(anchor)
        first_lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in first_lines:
                self.duplicates.append(
                    f"line {line}: {key.value}: given twice in one mapping, first on line "
                    f"{first_lines[key.value]}; keep one of them"
                )
            first_lines.setdefault(key.value, line)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Builds depth first and every alias anew, so that a value that holds itself is an error.

        Two sections that share an anchor are then two values, and one can change alone.
        """
        value = super().construct_object(node, deep=True)
        self.constructed_objects.pop(node, None)
        return value

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Decimal, 0o octal or 0x hexadecimal."""
        text = self.construct_scalar(node)
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text if base == 10 else text[2:], base)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes strings which YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Writes equal lists twice instead of by reference."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Escapes the line breaks that no other style keeps."""
        style = '"' if any(character in text for character in "\x85\u2028\u2029\ufeff") else None
        return self.represent_scalar(_PREFIX + "str", text, style=style)


for _tag, _form, _starts in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(_PREFIX + _tag, re.compile(f"^(?:{_form})$"), _starts)
_Loader.add_constructor(_PREFIX + "int", _Loader.construct_yaml_int)
_Dumper.add_representer(str, _Dumper.represent_text)


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Parses one YAML document.

    Args:
        text: The document.

    Returns:
        The value (None for an empty document) and one line per key that is given twice.

    Raises:
        YamlError: The text is not YAML, or holds more than one document.
    """
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.duplicates
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise YamlError(place + str(error.problem or error.context)) from None
    except yaml.reader.ReaderError as error:
        raise YamlError(f"character {error.position}: {error.reason}") from None
    except RecursionError:
        raise YamlError("nested too deeply") from None
    except ValueError as error:  # a number too long for Python's int
        raise YamlError(str(error)) from None


def dump_yaml(value: Any) -> str:
    """Writes a value as a YAML document that `parse_yaml` reads back as an equal value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def show_value(value: Any, max_characters: int = 80) -> str:
    """Writes a value on one line for a message, cut to `max_characters`."""
    text = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=float("inf")
    )
    text = " ".join(text.removesuffix("...\n").split())
    return text if len(text) <= max_characters else text[: max_characters - 1] + "…"
