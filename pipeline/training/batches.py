"""Batch arithmetic of GRPO, checked before TRL does, with numbers that would work.

    generation batch = per_device_train_batch_size x ranks x steps_per_generation

is sampled at once and holds whole groups of `num_generations` completions. `steps_per_generation`
is `gradient_accumulation_steps` unless it, or `generation_batch_size`, is set.
"""

import math
from collections.abc import Iterator
from typing import Any

DEFAULTS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 8,
    "steps_per_generation": None,
    "generation_batch_size": None,
}
"""TRL's, of the keys that are read; a test compares them."""


def batch_faults(values: dict[str, Any], num_ranks: int) -> Iterator[str]:
    """What does not go up.

    Args:
        values: Keys of section grpo that are TRL's, as they were given.
        num_ranks: Of the launch.

    Yields:
        A fault, with key, value, reason and remedy.
    """
    per_device, accumulation, group, steps, whole = (
        default if values.get(key) is None else values[key] for key, default in DEFAULTS.items()
    )
    if min(per_device, accumulation, group, steps or 1, whole or 1) < 1:
        return  # TRL or transformers says so
    if steps is not None and whole is not None:
        yield (
            f"grpo.generation_batch_size: {whole}: grpo.steps_per_generation is set too, and one "
            f"follows from the other; leave one of them out"
        )
        return
    at_once = per_device * num_ranks
    product = f"grpo.per_device_train_batch_size {per_device} x {_ranks(num_ranks)}"
    if whole is not None:
        works = math.lcm(at_once, group)
        if whole % at_once or whole % group:
            yield (
                f"grpo.generation_batch_size: {whole}: must be a multiple of {product} and of "
                f"grpo.num_generations {group}; set {_near(whole, works)} instead"
            )
        return
    steps = accumulation if steps is None else steps
    batch = at_once * steps
    if batch % group == 0:
        return
    name = "gradient_accumulation_steps" if values.get("steps_per_generation") is None else ""
    name = f"grpo.{name or 'steps_per_generation'}"
    groups = [size for size in range(2, batch + 1) if batch % size == 0]
    remedies = [
        f"grpo.per_device_train_batch_size {_near(per_device, _unit(group, num_ranks * steps))}",
        f"{name} {_near(steps, _unit(group, at_once))}",
    ]
    if groups:
        near = sorted(groups, key=lambda size: abs(size - group))[:2]
        remedies.insert(0, f"grpo.num_generations {' or '.join(map(str, sorted(near)))}")
    yield (
        f"grpo.num_generations: {group}: {product} x {name} {steps} = {batch} completions are no "
        f"whole number of groups; set {', or '.join(remedies)}, instead"
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
