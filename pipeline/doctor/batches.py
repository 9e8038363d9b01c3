"""Batch arithmetic of the training stages: what one optimizer step holds, and how often rows come.

    sequences a step = per_device_train_batch_size x ranks x gradient_accumulation_steps

In grpo they are prompts x num_generations.
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
