"""Mutations of every shipped config, by class: bad ones that must be refused, good ones that pass.

Nothing is drawn by chance: each file gives every class its share, taken evenly from its keys or in
turn from a list, so that a failing one is found again by its name.
"""

import copy
import gzip
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from pipeline.config_keys import own_fields
from pipeline.config_yaml import dump_yaml, parse_yaml
from pipeline.trl_keys import REFUSED, settable_keys, trl_fields

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
PER_FILE = {
    "misspelt key": 6,
    "wrong type": 6,
    "out of range": 6,
    "contradiction": 5,
    "missing file": 4,
    "broken YAML": 4,
    "binary file": 4,
}

OUT_OF_RANGE = {
    "run.seed": -1,
    "task.num_train": 0,
    "task.time_limit_seconds": 0,
    "calibration.batch_size": 0,
    "teacher.micro_batch_size": -8,
    "prune.sparsity": 1.0,
    "refine.every_steps": 0,
    "refine.regrow_fraction": 1.0,
    "movement.half_life_steps": 0.0,
    "evaluate.max_new_tokens": 0,
    "rewards.teacher_kl_clip": 0.0,
    "distill.per_device_train_batch_size": 0,
    "distill.learning_rate": -1.0e-3,
    "distill.max_length": 0,
    "on_policy.temperature": 0.0,
    "grpo.num_generations": 1,
    "grpo.save_steps": 0,
    "grpo.save_total_limit": 1,
    "grpo.gradient_accumulation_steps": -2,
}
CONTRADICTIONS = (  # what is changed, the key that is named, the stage that reads it
    ({"student.dtype": "bfloat16"}, "student.dtype", "grpo"),
    ({"rewards.weights": [1.0, 2.0, 3.0]}, "rewards.weights", None),
    ({"distill.kl_weight": 0.0, "distill.ce_weight": 0.0}, "distill.kl_weight", None),
    ({"evaluate.patience": 3, "evaluate.every_steps": None}, "evaluate.patience", None),
    ({"evaluate.text_stride": 6000}, "evaluate.text_stride", None),
    ({"calibration.source": "text"}, "calibration.text_path", None),
    ({"movement.kept": "displacement", "movement.dtype": "bfloat16"}, "movement.dtype", None),
    ({"refine.score": "fisher", "distill.muon_learning_rate": 0.01}, "refine.score", None),
    ({"prune.sparsity": 0.4, "refine.start_sparsity": 0.6}, "refine.start_sparsity", "grpo"),
    (
        {"grpo.per_device_train_batch_size": 8, "grpo.num_generations": 7},
        "grpo.num_generations",
        "grpo",
    ),
    (
        {"grpo.steps_per_generation": 2, "grpo.generation_batch_size": 64},
        "grpo.generation_batch_size",
        "grpo",
    ),
    ({"run.stages": ["evaluate", "prune"]}, "run.stages", None),
)
MISSING = {
    "student.path": "./nowhere",
    "task.path": "nowhere.jsonl",
    "evaluate.text_path": "nowhere.txt",
}


@dataclass(frozen=True)
class Mutation:
    """One config file."""

    name: str
    content: bytes
    says: str = ""
    """The key that the message must name; empty for a good one."""
    file_name: str = "config.yaml"
    """What `--config` is given; another name than `config.yaml` does not exist."""


@dataclass(frozen=True)
class Shipped:
    """A shipped file, parsed."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Shipped":
        """Parses a file."""
        return cls(path, parse_yaml(path.read_text())[0])

    @property
    def keys(self) -> dict[str, Any]:
        """Dotted keys and values, the last level being a key of a section."""
        return {
            f"{section}.{key}": value
            for section, content in self.values.items()
            for key, value in content.items()
        }

    @property
    def stages(self) -> list[str]:
        """Stages it runs."""
        default = ["prune", "distill", "grpo", "evaluate"]
        return self.values.get("run", {}).get("stages", default)

    def changed(self, changes: dict[str, Any], rename: tuple[str, str] | None = None) -> bytes:
        """The file with other values, or with one key under another name."""
        values = copy.deepcopy(self.values)
        for key, value in changes.items():
            section, name = key.split(".")
            values.setdefault(section, {})[name] = value
        if rename:
            section, name = rename[0].split(".")
            values[section][rename[1]] = values[section].pop(name)
        return dump_yaml(values).encode()


def evenly(items: list, number: int) -> list:
    """`number` items, spread over the list, the list again where it is shorter."""
    step = max(1, len(items) // number)
    return list(islice(cycle(items[::step] or items), number))


def misspelt(name: str) -> str:
    """A name with its middle letter left out."""
    middle = len(name) // 2
    return name[:middle] + name[middle + 1 :]


def another_type(key: str, value: Any) -> Any:
    """A value of a type that the key does not take; None where any may do."""
    section, name = key.split(".")
    if key not in own_fields() and trl_fields(section).get(name) is None:
        return None
    match value:
        case bool():
            return "maybe"
        case int() | float():
            return "many"
        case dict() | list():
            return 7.5
    return [3.5]


def bad_mutations(kind: str, shipped: Shipped, index: int) -> Iterator[Mutation]:
    """The bad mutations of one class of one file.

    Args:
        kind: A key of `PER_FILE`.
        shipped: The file.
        index: Its number, at which lists of changes are begun.
    """
    number, text = PER_FILE[kind], shipped.path.read_text()
    if kind == "misspelt key":
        known = {key.split(".")[-1] for key in own_fields()}
        known |= {name for section in REFUSED for name in settable_keys(section)}
        keys = [key for key in shipped.keys if misspelt(key.split(".")[1]) not in known]
        for turn, key in enumerate(evenly(keys, number)):
            name = misspelt(key.split(".")[1]) + "x" * (turn >= len(keys))
            section = key.split(".")[0]
            yield Mutation(key, shipped.changed({}, (key, name)), f"{section}.{name}")
    elif kind == "wrong type":
        wrong = {key: another_type(key, value) for key, value in shipped.keys.items()}
        keys = [key for key, value in wrong.items() if value is not None]
        for turn, key in enumerate(evenly(keys, number)):
            value = wrong[key] if turn < len(keys) else {"a": 1}
            yield Mutation(key, shipped.changed({key: value}), key)
    elif kind == "out of range":
        for key, value in islice(cycle(OUT_OF_RANGE.items()), index * number, (index + 1) * number):
            yield Mutation(key, shipped.changed({key: value}), key)
    elif kind == "contradiction":
        fitting = [c for c in CONTRADICTIONS if c[2] is None or c[2] in shipped.stages]
        for changes, key, _ in islice(cycle(fitting), index * number, (index + 1) * number):
            yield Mutation("+".join(changes), shipped.changed(changes), key)
    elif kind == "missing file":
        yield Mutation("itself", text.encode(), "--config", "confg.yaml")
        for key, value in MISSING.items():
            yield Mutation(key, shipped.changed({key: value}), key)
    elif kind == "broken YAML":
        yield Mutation("unclosed", f"{text}\nlora: {{r: 8\n".encode(), "--config")
        yield Mutation("tab", f"{text}\nlora:\n\tr: 8\n".encode(), "--config")
        yield Mutation("quote", f'{text}\nlora: {{r: "8}}\n'.encode(), "--config")
        section = next(iter(shipped.values))
        yield Mutation("twice", f"{text}\n{section}: {{}}\n".encode(), section)
    else:
        noise = random.Random(index).randbytes(4096)
        yield Mutation("noise", noise, "--config")
        yield Mutation("gzip", gzip.compress(text.encode(), mtime=0), "--config")
        yield Mutation("utf-16", text.encode("utf-16"), "--config")
        yield Mutation("null", text.encode().replace(b"\n", b"\0", 1), "--config")


def good_mutations(shipped: Shipped) -> Iterator[Mutation]:
    """Other ways to write the same config."""
    text = shipped.path.read_text()
    lines = [line.split("  # ")[0] for line in text.splitlines() if not line.startswith("#")]
    turned = {
        section: dict(reversed(content.items()))
        for section, content in reversed(shipped.values.items())
    }
    yield Mutation("no comments", "\n".join(lines).encode())
    yield Mutation("CRLF", text.replace("\n", "\r\n").encode())
    yield Mutation("byte order mark", b"\xef\xbb\xbf" + text.encode())
    yield Mutation("other order", dump_yaml(turned).encode())
    yield Mutation("an empty section", f"{text}\nlora:\n".encode())
