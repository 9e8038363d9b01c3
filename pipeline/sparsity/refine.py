"""Refinement: old mask + scores + target sparsity -> new mask. Some weights pruned, some regrown.

Kept and pruned weights are ranked apart, because their scores have different units:

    n_regrow = round(regrow_fraction x kept now), the largest |movement| of the pruned
    n_prune  = n_regrow + (zeros wanted - zeros now), the lowest keep score

The fraction is of the kept weights, as in RigL (arXiv 1911.11134): a tenth of the zeros would at
sparsity 0.9 replace nine tenths of what is left.

A regrown weight starts at 0, the smallest magnitude there is, with m = 0 and its old v. It would be
pruned again at once; that it survives is the work of `protect_steps`, during which it is not pruned
and can grow. It does not start at its proposed update, which is a sum over many steps in units of
the learning rate: as a jump it would change the function before any gradient agreed to it.

Every rank works on its own shards and only counters are sent, so no rank ever holds a whole score.
Numbers and thresholds are global, and the new mask does not depend on the sharding.

Scopes: `matrix`, `model`, and `row`, where both counts are formed row by row and each row ends with
the same number of zeros. N:M is left out: it fixes the zeros of each run of m, and a fraction of
one or two kept weights rounds to no regrowth at all.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.sparsity.bits import bits_at, clear_bits, positions_in_pieces
from pipeline.sparsity.candidates import Values
from pipeline.sparsity.collectives import all_reduce_sum
from pipeline.sparsity.refine_rows import choose_in_rows
from pipeline.sparsity.refine_thresholds import Sides, choose_by_threshold
from pipeline.sparsity.scores import SCORES, keep_scores, movement
from pipeline.sparsity.shards import FIRST_MOMENTS, Shard, ShardedWeights
from pipeline.sparsity.state import Regrown, SparsityState
from pipeline.sparsity.undo import Undo

SCOPES = ("matrix", "model", "row")


@dataclass(frozen=True, kw_only=True)
class RefinementRule:
    """How weights are chosen; when and how many is the schedule's."""

    scope: str
    """`matrix`: each matrix has the target sparsity; `model`: all weights compete; `row`: each row
    of each matrix has it."""
    score: str
    """`magnitude`, `movement`, `fisher` or `mix`, see `sparsity/scores.py`."""
    movement_weight: float
    """Share of movement in `mix`, in [0, 1]."""
    protect_steps: int
    """Steps during which a regrown weight is not pruned."""
    min_density: float
    """Fraction of its weights that each matrix keeps at least under scope `model`, in [0, 1]."""

    def __post_init__(self):
        """Checks the values.

        Raises:
            ValueError: One is unknown.
        """
        for key, known in (("scope", SCOPES), ("score", SCORES)):
            if getattr(self, key) not in known:
                raise ValueError(
                    f"refine.{key}: {getattr(self, key)!r} is unknown; set one of "
                    f"{', '.join(known)}"
                )


@dataclass(frozen=True)
class Refinement:
    """What one refinement did, in weights of all ranks."""

    pruned: int
    regrown: int
    survived: int
    """Of the weights that ever regrew, those that are kept now."""


@torch.no_grad()
def refine(
    state: SparsityState,
    weights: ShardedWeights,
    rule: RefinementRule,
    *,
    sparsity: float,
    regrow_fraction: float,
    step: int,
    undo: Undo | None = None,
) -> Refinement:
    """Refines the masks of a state in place. Every rank calls it, with the same arguments.

    Newly pruned weights are set to 0 in fp32 and published; movement restarts where a weight
    changes side; the first moment of regrown weights is cleared (with v cleared too, Adam's first
    update would be about three learning rates).

    Args:
        state: Masks, movement and regrown weights of the shards; changed in place.
        weights: The shards.
        rule: How weights are chosen.
        sparsity: Wanted fraction of zeros afterwards, in [0, 1].
        regrow_fraction: Weights that regrow, as a fraction of the kept ones, in [0, 1].
        step: The present step, for protection.
        undo: Notes what is changed, so that it can be taken back before the next step.

    Returns:
        The counts.

    Raises:
        ValueError: A score is NaN or was never observed, or too few weights are free to be pruned.
            Nothing is changed then.
    """
    sides = Sides(
        state,
        weights,
        keep=keep_scores(
            rule.score,
            weights,
            state,
            movement_weight=rule.movement_weight,
            together=rule.scope == "model",
        ),
        stay={name: _stay(movement(state, name)) for name in weights.shards},
        free={name: _free_bits(state, name, rule.protect_steps, step) for name in weights.shards},
    )
    if rule.scope == "row":
        changed = choose_in_rows(sides, sparsity, regrow_fraction)
    else:
        floor = rule.min_density if rule.scope == "model" else None
        changed = choose_by_threshold(sides, sparsity, regrow_fraction, floor)
    counts = torch.zeros(3, dtype=torch.int64)
    for name, shard in weights.shards.items():
        if undo is not None:
            undo.note(state, weights, shard, changed[name])
        num_pruned, num_regrown = _apply(sides, shard, changed[name], step)
        survived = state.regrown[name].indices.numel()
        counts += torch.tensor([num_pruned, num_regrown, survived])
    weights.publish()
    return Refinement(*all_reduce_sum(counts, weights.group).tolist())


def _free_bits(state: SparsityState, name: str, protect_steps: int, step: int) -> Tensor:
    """Packed bits of the kept weights that did not regrow within `protect_steps`."""
    regrown, mask = state.regrown[name], state.masks[name]
    protected = regrown.indices[step - regrown.steps < protect_steps]
    if not protected.numel():
        return mask
    free = mask.clone()
    clear_bits(free, protected.long())
    return free


def _stay(moved: Values) -> Values:
    return lambda at: -moved(at).abs()


def _apply(sides: Sides, shard: Shard, changed: Tensor, step: int) -> tuple[int, int]:
    """Moves the selected weights of one shard to the other side.

    Args:
        sides: The state, changed in place, and the moments.
        shard: The shard.
        changed: Packed bits of the weights that change side.
        step: Noted for those that regrow.

    Returns:
        How many were pruned, and how many regrew.
    """
    state, name, weight = sides.state, shard.name, shard.weight
    first_moments = [sides.weights.moments(shard, key) for key in FIRST_MOMENTS]
    num_pruned, grown = 0, [torch.empty(0, dtype=torch.int64, device=weight.device)]
    for positions in positions_in_pieces(changed):
        state.movement[name].index_fill_(0, positions, 0.0)
        was_kept = bits_at(state.masks[name], positions)
        pruned = positions[was_kept]
        weight.index_fill_(0, pruned, 0.0)
        num_pruned += pruned.numel()
        grown.append(positions[~was_kept])
        for moment in first_moments:
            if moment is not None:
                moment.index_fill_(0, grown[-1], 0.0)
    state.masks[name] ^= changed
    regrown = torch.cat(grown)
    state.regrown[name] = _note(state.regrown[name], regrown, state.masks[name], step)
    return num_pruned, regrown.numel()


def _note(regrown: Regrown, grown: Tensor, mask: Tensor, step: int) -> Regrown:
    """The kept weights that once regrew, with those of this step; pruned ones drop out."""
    stays = bits_at(mask, regrown.indices.long())
    indices = torch.cat([regrown.indices[stays], grown.to(regrown.indices.dtype)])
    steps = torch.cat([regrown.steps[stays], torch.full_like(grown, step, dtype=torch.int32)])
    order = indices.argsort()
    return Regrown(indices[order], steps[order])
