"""One refinement against one pass over the memory of the shards.

A pass reads w, S and the mask bits once: `w.sum()`, `S.sum()` and `mask.amax()` of every shard,
8 + 1/8 bytes a weight, which is what torch reads fastest.

A refinement keeps the sparsity and regrows `REGROW_FRACTION` of the kept weights. Before each one
weights, masks and movement are put back, so all of them do the same work.
"""

from launch.benchmarks.timing import Side, alternate, ratios, summary
from launch.benchmarks.workbench import SPARSITY, Workbench
from pipeline.sparsity.refine import Refinement, RefinementRule, refine
from pipeline.sparsity.state import SparsityState

REGROW_FRACTION = 0.05
GOAL_PASSES = 12.0


def refinement_rule(scope: str) -> RefinementRule:
    """By magnitude, with a floor under `model` as low as the configs'."""
    return RefinementRule(
        scope=scope, score="magnitude", movement_weight=0.0, protect_steps=0, min_density=0.01
    )


class Rerun:
    """A refinement that can be done again from the same start."""

    def __init__(self, bench: Workbench):
        """Copies the weights and makes a state."""
        self.bench = bench
        self.state = bench.state()
        shards = bench.weights.shards
        self.saved = {
            name: (shard.weight.clone(), self.state.masks[name].clone())
            for name, shard in shards.items()
        }
        self.movement = {name: moved.clone() for name, moved in self.state.movement.items()}

    def restore(self) -> None:
        """Everything as it was, and no weight regrown."""
        fresh = SparsityState.from_masks(self.bench.masks, self.bench.weights).regrown
        for name, (weight, mask) in self.saved.items():
            self.bench.weights.shards[name].weight.copy_(weight)
            self.state.masks[name].copy_(mask)
            self.state.movement[name].copy_(self.movement[name])
            self.state.regrown[name] = fresh[name]

    def refine(self, scope: str) -> Refinement:
        """One refinement at the present sparsity."""
        return refine(
            self.state,
            self.bench.weights,
            refinement_rule(scope),
            sparsity=SPARSITY,
            regrow_fraction=REGROW_FRACTION,
            step=1,
        )

    def read_once(self) -> None:
        """One pass, see above."""
        for name, shard in self.bench.weights.shards.items():
            shard.weight.sum()
            self.state.movement[name].sum()
            self.state.masks[name].amax()


def refinement(bench: Workbench, num_rounds: int) -> tuple[dict, SparsityState]:
    """Seconds of a refinement by scope and of a pass, and the state after one."""
    rerun = Rerun(bench)
    sides = {"pass": Side(rerun.read_once, rerun.restore)}
    for scope in ("matrix", "model"):
        sides[scope] = Side(lambda scope=scope: rerun.refine(scope), rerun.restore, once=True)
    taken = alternate(sides, bench.device, num_rounds)
    rerun.restore()
    done = rerun.refine("matrix")
    one_pass = taken.pop("pass")
    scopes = {
        scope: {"seconds": summary(seconds), "passes": ratios(seconds, one_pass)}
        for scope, seconds in taken.items()
    }
    result = {
        "pass_seconds": summary(one_pass),
        "pass_bytes_per_weight": 8.125,
        "scopes": scopes,
        "pruned": done.pruned,
        "regrown": done.regrown,
    }
    return result, rerun.state
