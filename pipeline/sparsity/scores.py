"""What a weight is worth when the mask is refined. High = keep.

- `magnitude`: |w| (Han et al. 2015, arXiv 1506.02626).
- `movement`: the accumulated movement of a kept weight. -g*w is positive when training moves it
  away from zero (Sanh et al. 2020, arXiv 2005.07683, section 4); (g*w)^2 is large where the loss
  depends on it, as `fisher`, with any optimizer and a horizon of its own.
- `fisher`: w^2 v, with Adam's second moment v for the diagonal of the Fisher matrix, as ELSA
  weights its projection (arXiv 2510.01650): the loss that pruning costs to second order (LeCun et
  al. 1989, "Optimal Brain Damage"). Ranked by its root |w| sqrt(v), which is in the same order and
  does not underflow. The bias correction of v is one factor for all and left out.
- `mix`: (1 - a) * rank(|w|) + a * rank(movement), ranks in [0, 1] among the kept weights that are
  compared. The two have different units, ranks have none.

Ranks come from `RankTable`, without sorting over ranks. Every operation is elementwise and rounded
exactly by IEEE 754 (no fused multiply-add), so scores are bit for bit the same for every sharding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.sparsity.candidates import CHUNK, Values
from pipeline.sparsity.collectives import all_reduce_sum
from pipeline.sparsity.keys import KEY_BITS, order_keys
from pipeline.sparsity.masks import unpack_mask
from pipeline.sparsity.shards import Shard, ShardedWeights
from pipeline.sparsity.state import SparsityState

SCORES = ("magnitude", "movement", "fisher", "mix")
RANK_BITS = 12
"""Sign, exponent and three bits of the mantissa: values in one bin differ by at most 1/8."""
LOW_BITS = KEY_BITS - RANK_BITS


class RankTable:
    """Ranks of fp32 values by a cumulated histogram that is linear inside each bin.

        rank(x) = (elements in lower bins + elements in x's bin * t) / elements

    A bin holds the values whose keys share their first `RANK_BITS` bits, and t in [0, 1) is the
    rest of the key. Equal values have equal ranks. The exact rank of x counts all elements of lower
    bins and some of its own, so the two differ by at most the share of x's bin.
    """

    def __init__(self, counts: Tensor):
        """`counts`: int64 (2^RANK_BITS,), elements in each bin over all ranks."""
        total = counts.sum().clamp(min=1).double()
        self.below = ((counts.cumsum(0) - counts) / total).float()
        self.share = (counts / total).float()

    def __call__(self, values: Tensor) -> Tensor:
        """fp32 (n,) values to fp32 (n,) ranks in [0, 1]."""
        keys = order_keys(values)
        bins = keys >> LOW_BITS
        rest = (keys & ((1 << LOW_BITS) - 1)).float() * 2.0**-LOW_BITS
        below, share = self.below.to(values.device), self.share.to(values.device)
        return below[bins] + share[bins] * rest


def normalised_ranks(values: Tensor) -> Tensor:
    """Exact ranks of a flat tensor divided by its length: lowest 1/n, highest 1. Ties by position.

    For whole matrices on one rank.
    """
    ranks = torch.empty_like(values, dtype=torch.float32)
    order = values.sort(stable=True).indices
    ranks[order] = torch.arange(
        1, values.numel() + 1, dtype=torch.float32, device=values.device
    ) / max(1, values.numel())
    return ranks


def keep_scores(
    kind: str,
    weights: ShardedWeights,
    state: SparsityState,
    *,
    movement_weight: float,
    together: bool,
) -> dict[str, Values]:
    """Scores of this rank's kept weights. Every rank calls it.

    Args:
        kind: One of `SCORES`.
        weights: The shards.
        state: Their masks and movement.
        movement_weight: a of `mix`, in [0, 1].
        together: Whether `mix` ranks all weights together; else each matrix by itself.

    Returns:
        Name to function of local positions, fp32; see `Values`.

    Raises:
        ValueError: `kind` is unknown; needs movement and none was observed (all zeros); needs a
            second moment and the optimizer has none; or ranks what is NaN.
    """
    shards = weights.shards
    if kind == "magnitude":
        return {name: magnitude(shard) for name, shard in shards.items()}
    if kind == "fisher":
        _check_second_moment(weights)
        return {name: _fisher(weights, shard) for name, shard in shards.items()}
    if kind not in ("movement", "mix"):
        raise ValueError(f"refine.score: {kind!r} is unknown; set one of {', '.join(SCORES)}")
    _check_observed(kind, weights, state)
    moved = {name: movement(state, name) for name in shards}
    if kind == "movement":
        return moved
    sizes = {name: magnitude(shard) for name, shard in shards.items()}
    size_ranks = _rank_tables("weight", sizes, weights, state, together)
    moved_ranks = _rank_tables("movement", moved, weights, state, together)
    return {
        name: _mix(sizes[name], moved[name], size_ranks[name], moved_ranks[name], movement_weight)
        for name in shards
    }


def magnitude(shard: Shard) -> Values:
    """|w| of local positions."""
    weight = shard.weight
    return lambda at: weight[at].abs()


def movement(state: SparsityState, name: str) -> Values:
    """Accumulated movement of local positions, in fp32."""
    accumulated = state.movement[name]
    return lambda at: accumulated[at].float()


def _fisher(weights: ShardedWeights, shard: Shard) -> Values:
    weight, second = shard.weight, weights.moments(shard, "exp_avg_sq")
    return lambda at: weight[at].abs() * second[at].float().sqrt()


def _mix(
    size: Values, moved: Values, size_ranks: RankTable, moved_ranks: RankTable, share: float
) -> Values:
    return lambda at: (1.0 - share) * size_ranks(size(at)) + share * moved_ranks(moved(at))


def _rank_tables(
    what: str,
    values: dict[str, Values],
    weights: ShardedWeights,
    state: SparsityState,
    together: bool,
) -> dict[str, RankTable]:
    """The table of each of this rank's weights, over the kept elements of all ranks."""
    number = {name: 0 if together else index for index, name in enumerate(weights.shapes)}
    counts = torch.zeros(1 if together else len(number), 1 << RANK_BITS, dtype=torch.int64)
    for name, shard in weights.shards.items():
        for start, stop in _chunks(shard.numel):
            kept = values[name](slice(start, stop))[_kept(state, name, start, stop)]
            bins = (order_keys(kept) >> LOW_BITS).int()
            counts[number[name]] += torch.bincount(bins, minlength=1 << RANK_BITS).cpu()
    counts = all_reduce_sum(counts, weights.group)
    infinite = order_keys(torch.tensor([-torch.inf, torch.inf])) >> LOW_BITS
    nan = counts[:, : infinite[0]].sum(1) + counts[:, infinite[1] + 1 :].sum(1)
    if nan.any():
        name = "the model" if together else list(number)[int(nan.nonzero()[0])]
        raise ValueError(f"score: {int(nan.sum())} values of {name}'s {what} are NaN")
    tables = [RankTable(row) for row in counts]
    return {name: tables[number[name]] for name in weights.shards}


def _check_observed(kind: str, weights: ShardedWeights, state: SparsityState) -> None:
    """Refuses movement that is zero for every kept weight."""
    observed = any(
        bool(state.movement[name][start:stop][_kept(state, name, start, stop)].any())
        for name, shard in weights.shards.items()
        for start, stop in _chunks(shard.numel)
    )
    if not all_reduce_sum(torch.tensor([int(observed)]), weights.group).any():
        raise ValueError(
            f"refine.score: {kind!r} needs movement and none was observed yet; set "
            "refine.begin_step to at least 1"
        )


def _check_second_moment(weights: ShardedWeights) -> None:
    """Refuses an optimizer without Adam's second moment."""
    missing = [
        name
        for name, shard in weights.shards.items()
        if weights.moments(shard, "exp_avg_sq") is None
    ]
    if all_reduce_sum(torch.tensor([len(missing)]), weights.group).any():
        raise ValueError(
            "refine.score: 'fisher' needs the optimizer's second moment exp_avg_sq, which "
            f"{missing[0] if missing else 'a weight on another rank'} does not have; train with "
            "Adam or AdamW, and refine after the first step"
        )


def _kept(state: SparsityState, name: str, start: int, stop: int) -> Tensor:
    """Bool (stop - start,): the kept elements of a range that begins at a byte."""
    return unpack_mask(state.masks[name][start // 8 : (stop + 7) // 8], (stop - start,))


def _chunks(numel: int) -> Sequence[tuple[int, int]]:
    return [(start, min(start + CHUNK, numel)) for start in range(0, numel, CHUNK)]
