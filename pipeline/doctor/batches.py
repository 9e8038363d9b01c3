"""Batch arithmetic of the training stages: what one optimizer step holds, and how often rows come.

    sequences a step = per_device_train_batch_size x ranks x gradient_accumulation_steps

In grpo they are prompts x num_generations. TRL draws whole generation batches of distinct prompts
and drops a rest: with fewer training prompts than one batch asks for there would be no step at all.
"""

from typing import Any


def step_sequences(arguments: Any) -> int:
    """Sequences in one optimizer step, over all ranks."""
    per_rank = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return per_rank * arguments.world_size


def batch_line(stage: str, arguments: Any, num_rows: int) -> str:
    """One sentence on a stage's batches.

    Args:
        stage: `distill`, `on_policy` or `grpo`.
        arguments: TRL's.
        num_rows: Completions to learn from, or training prompts.
    """
    sequences, steps = step_sequences(arguments), arguments.max_steps
    factors = (
        f"{arguments.per_device_train_batch_size} a rank x {arguments.world_size} "
        f"x {arguments.gradient_accumulation_steps} accumulated"
    )
    drawn, rows = sequences, "completions" if stage == "distill" else "prompts"
    if stage == "grpo":
        drawn = sequences / arguments.num_generations / arguments.num_iterations
        factors += f" = {sequences // arguments.num_generations} prompts x "
        factors += f"{arguments.num_generations} completions"
    if steps < 1:
        return f"{sequences} sequences a step ({factors}), {num_rows} {rows}"
    epochs = steps * drawn / num_rows
    return (
        f"{steps} steps of {sequences} sequences ({factors}): {num_rows} {rows} {epochs:.2g} times"
    )


def batch_fault(stage: str, arguments: Any, num_rows: int) -> str | None:
    """A stage that would take no step; None where it would."""
    if stage != "grpo":
        return None
    wanted = arguments.generation_batch_size // arguments.num_generations
    if wanted <= num_rows:
        return None
    largest = num_rows * arguments.num_generations
    return (
        f"grpo.generation_batch_size: {arguments.generation_batch_size}: asks for {wanted} prompts "
        f"at once and the task has {num_rows} to train on; set it, or per_device_train_batch_size "
        f"x ranks x gradient_accumulation_steps, to {largest} at most instead"
    )
