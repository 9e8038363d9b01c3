"""A tracked and masked optimizer step against fused AdamW alone, on the same weights.

Bytes a weight that a step has to move, if every tensor were read and written once per pass:

    fused AdamW         w, m, v read and written, g read                    28
    before the update   S read and written, w read; g read for a gradient   12 or 16
    after the update    w read and written; S once more for `proposed`
                        or `displacement`                                    8 or 16

and one bit of mask a pass. With S in bf16 every 8 of S are 4. The issue's 52 = 28 + 16 + 8 is the
rule that reads gradients only; the default, which observes the proposed update, needs 60.
"""

import torch

from launch.benchmarks.timing import Side, alternate, ratios, summary
from launch.benchmarks.workbench import Workbench
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.state import SparsityState

ADAMW_BYTES = 28
HALF_LIFE_STEPS = 20.0
MASK_BYTES = 1 / 8
LIMIT = 52 / 28
GOAL = 1.2 * LIMIT

RULES = {
    f"{kept} + {pruned}, {str(dtype).removeprefix('torch.')}": MovementRule(
        kept=kept, pruned=pruned, half_life_steps=HALF_LIFE_STEPS, dtype=dtype
    )
    for kept, pruned, dtype in (
        ("gradient", "proposed", torch.float32),
        ("gradient", "negative_gradient", torch.float32),
        ("displacement", "proposed", torch.float32),
        ("gradient", "proposed", torch.bfloat16),
        ("gradient", "negative_gradient", torch.bfloat16),
    )
}


def engine_bytes(rule: MovementRule) -> float:
    """Bytes a weight that the hooks move beside the optimizer's."""
    stored = 2 * rule.dtype.itemsize
    reads_gradient = "gradient" in (rule.kept, rule.pruned.removeprefix("negative_"))
    reads_mask_before = rule.pruned == "negative_gradient"
    again = rule.pruned == "proposed" or rule.kept == "displacement"
    before = stored + 4 + 4 * reads_gradient + MASK_BYTES * reads_mask_before
    return before + 8 + MASK_BYTES + stored * again


class Switch:
    """Puts one rule's hooks on the optimizer, or none."""

    def __init__(self, bench: Workbench):
        """`bench`: whose optimizer is stepped; it has no hooks yet."""
        self.bench = bench
        self.hooks = None

    def to(self, rule: MovementRule | None, state: SparsityState | None) -> None:
        """Takes off what is there. Binding zeroes pruned weights, which is not timed."""
        if self.hooks is not None:
            self.hooks.remove()
        self.hooks = None if rule is None else self.bench.bind(rule, state)


def optimizer_step(bench: Workbench, update_bytes_per_second: float, num_rounds: int) -> dict:
    """Seconds of a step with and without each rule, and how near they come to the bytes moved.

    Args:
        bench: The weights; they change.
        update_bytes_per_second: Measured in this run.
        num_rounds: Samples of each side.
    """
    states = {dtype: bench.state(dtype) for dtype in {rule.dtype for rule in RULES.values()}}
    switch = Switch(bench)
    step = bench.weights.optimizer.step
    sides = {"fused AdamW": Side(step, lambda: switch.to(None, None))}
    for name, rule in RULES.items():
        sides[name] = Side(step, lambda rule=rule: switch.to(rule, states[rule.dtype]))
    taken = alternate(sides, bench.device, num_rounds)
    switch.to(None, None)
    plain = taken.pop("fused AdamW")

    def described(seconds: list[float], num_bytes: float) -> dict:
        measured = summary(seconds)
        speed = num_bytes * bench.num_weights / measured["median"]
        return {
            "seconds": measured,
            "bytes_per_weight": num_bytes,
            "bytes_per_second": speed,
            "share_of_bandwidth": speed / update_bytes_per_second,
        }

    rules = {}
    for name, seconds in taken.items():
        num_bytes = ADAMW_BYTES + engine_bytes(RULES[name])
        rules[name] = {
            **described(seconds, num_bytes),
            "ratio": ratios(seconds, plain),
            "ratio_allowed_by_bytes": num_bytes / ADAMW_BYTES,
        }
    return {"fused AdamW": described(plain, ADAMW_BYTES), "rules": rules}
