"""Batch arithmetic of GRPO, checked before TRL does, with numbers that would work.

    generation batch = per_device_train_batch_size x ranks x steps_per_generation

is sampled at once and holds whole groups of `num_generations` completions. `steps_per_generation`
is `gradient_accumulation_steps` unless it, or `generation_batch_size`, is set. The launcher tells
the number of ranks.
"""

import math
import os
from collections.abc import Iterator
from typing import Any

from pipeline.config import Config
from pipeline.rules.fault import Fault

DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "steps_per_generation": None,
    "generation_batch_size": None,
}
"""TRL's, of the keys that are read; a test compares them."""

KEYS = tuple(f"grpo.{name}" for name in DEFAULTS)


def batch_faults(config: Config) -> Iterator[Fault]:
    """Groups that do not go up in the launch this is."""
    if "grpo" in config.run.stages:
        num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
        yield from group_faults(config.grpo.trl_values, num_ranks)


def group_faults(values: dict[str, Any], num_ranks: int) -> Iterator[Fault]:
    """Groups that do not go up.

    Args:
        values: TRL's keys of section grpo, as they were given.
        num_ranks: Of the launch.
    """
    per_device, accumulation, group, steps, whole = (
        default if values.get(key) is None else values[key] for key, default in DEFAULTS.items()
    )
    if steps is not None and whole is not None:
        yield Fault(
            "grpo.generation_batch_size",
            whole,
            "grpo.steps_per_generation is set too, and one follows from the other",
            "leave one of them out",
            KEYS,
        )
        return
    at_once = per_device * num_ranks
    product = f"grpo.per_device_train_batch_size {per_device} x {_ranks(num_ranks)}"
    if whole is not None:
        if whole % at_once or whole % group:
            yield Fault(
                "grpo.generation_batch_size",
                whole,
                f"must be a multiple of {product} and of grpo.num_generations {group}",
                f"set {_near(whole, math.lcm(at_once, group))} instead",
                KEYS,
            )
        return
    name = "gradient_accumulation_steps" if steps is None else "steps_per_generation"
    steps = accumulation if steps is None else steps
    batch = at_once * steps
    if batch % group:
        remedies = [
            f"grpo.per_device_train_batch_size "
            f"{_near(per_device, _unit(group, num_ranks * steps))}",
            f"grpo.{name} {_near(steps, _unit(group, at_once))}",
        ]
        groups = [size for size in range(2, batch + 1) if batch % size == 0]
        if groups:
            near = sorted(sorted(groups, key=lambda size: abs(size - group))[:2])
            remedies.insert(0, f"grpo.num_generations {' or '.join(map(str, near))}")
        yield Fault(
            "grpo.num_generations",
            group,
            f"{product} x grpo.{name} {steps} = {batch} completions are no whole number of groups",
            f"set {', or '.join(remedies)}, instead",
            KEYS,
        )


def _unit(group: int, others: int) -> int:
    """The smallest factor that makes a multiple of `group` of the other factors."""
    return group // math.gcd(group, others)


def _near(value: int, unit: int) -> str:
    """The multiples of `unit` around a value."""
    lower = value // unit * unit
    return f"{lower} or {lower + unit}" if lower else str(unit)


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"
