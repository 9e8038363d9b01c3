"""Batch arithmetic of GRPO, checked before TRL does, with numbers that would work.

    generation batch = per_device_train_batch_size x ranks x steps_per_generation

is sampled at once and holds whole groups of `num_generations` completions. `steps_per_generation`
is `gradient_accumulation_steps` unless it, or `generation_batch_size`, is set. The launcher tells
the number of ranks. TRL draws whole generation batches of distinct prompts and drops a rest: with
fewer training prompts than one batch asks for it would take no step and say that it is done.
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
        yield from group_faults(config.grpo.trl_values, _num_ranks())


def prompt_fault(config: Config, num_prompts: int) -> str | None:
    """What is wrong where the task has too few training prompts for one generation batch of grpo.

    Args:
        config: One without `batch_faults`.
        num_prompts: Distinct training prompts.
    """
    if "grpo" not in config.run.stages:
        return None
    per_device, accumulation, group, steps, whole = _filled(config.grpo.trl_values)
    whole = whole or per_device * _num_ranks() * (steps or accumulation)
    if whole // group <= num_prompts:
        return None
    return (
        f"grpo.generation_batch_size: {whole}: asks for {whole // group} prompts at once and the "
        f"task has {num_prompts} to train on; set it, or grpo.per_device_train_batch_size x ranks "
        f"x grpo.gradient_accumulation_steps, to {num_prompts * group} or less instead"
    )


def group_faults(values: dict[str, Any], num_ranks: int) -> Iterator[Fault]:
    """Groups that do not go up.

    Args:
        values: TRL's keys of section grpo, as they were given.
        num_ranks: Of the launch.
    """
    per_device, accumulation, group, steps, whole = _filled(values)
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


def _filled(values: dict[str, Any]) -> tuple:
    """The keys of `DEFAULTS` in their order."""
    return tuple(
        default if values.get(key) is None else values[key] for key, default in DEFAULTS.items()
    )


def _num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _unit(group: int, others: int) -> int:
    """The smallest factor that makes a multiple of `group` of the other factors."""
    return group // math.gcd(group, others)


def _near(value: int, unit: int) -> str:
    """The multiples of `unit` around a value."""
    lower = value // unit * unit
    return f"{lower} or {lower + unit}" if lower else str(unit)


def _ranks(number: int) -> str:
    return f"{number} rank{'' if number == 1 else 's'}"
