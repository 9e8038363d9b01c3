"""The choice of a refinement under scope `row`: each row by itself, decided where it lies.

In every row n_regrow = round(regrow_fraction x kept of the row), and n_prune as in `refine.py`, so
that the row ends with round(sparsity x its length) zeros.
"""

import torch
from torch import Tensor

from pipeline.sparsity.collectives import all_reduce_sum
from pipeline.sparsity.groups import Fields, Runs, decide_runs, lowest_in_runs
from pipeline.sparsity.masks import unpack_mask
from pipeline.sparsity.refine_thresholds import Sides
from pipeline.sparsity.scores import magnitude


def choose_in_rows(sides: Sides, sparsity: float, regrow_fraction: float) -> dict[str, Tensor]:
    """Chooses the weights that change side. Every rank calls it.

    Args:
        sides: The scores.
        sparsity: Wanted fraction of zeros of each row, in [0, 1].
        regrow_fraction: Weights that regrow, as a fraction of a row's kept ones.

    Returns:
        Name to packed bits of the weights that change side.

    Raises:
        ValueError: A score is NaN, or a row has too few weights that may be pruned.
    """
    names = list(sides.weights.shapes)
    number = {name: index for index, name in enumerate(names)}
    problems = torch.zeros(2, len(names), dtype=torch.int64)

    def decide(name: str, first: Tensor, fields: Fields) -> Tensor:
        mask, free = fields["mask"], fields["free"]
        num_zeros = (~mask).sum(1)
        more_zeros = round(sparsity * mask.shape[1]) - num_zeros
        num_regrow = (regrow_fraction * mask.sum(1).double()).round().long()
        num_regrow = torch.minimum(num_regrow, num_zeros).maximum(-more_zeros)
        num_prune = torch.minimum(num_regrow + more_zeros, free.sum(1))
        num_regrow = num_prune - more_zeros
        nan = torch.where(mask, fields["keep"], fields["stay"]).isnan()
        problems[0, number[name]] += int(nan.sum())
        problems[1, number[name]] += int((num_regrow < 0).sum())
        ties = fields["magnitude"]
        return lowest_in_runs(fields["keep"], ties, free, num_prune, name, first) | (
            lowest_in_runs(fields["stay"], ties, ~mask, num_regrow, name, first)
        )

    runs = [_rows(sides, name) for name in sides.keep]
    changed = dict(zip(sides.keep, decide_runs(runs, decide, sides.weights.group), strict=True))
    nan, short = all_reduce_sum(problems, sides.weights.group)
    if nan.any():
        raise ValueError(f"score: values of {names[int(nan.nonzero()[0])]} are NaN")
    if short.any():
        raise ValueError(
            f"refine.protect_steps: a row of {names[int(short.nonzero()[0])]} has too few weights "
            f"that are not protected to reach sparsity {sparsity:.4f}; lower it"
        )
    return changed


def _rows(sides: Sides, name: str) -> Runs:
    """The rows of one shard with all that a decision needs."""
    shard = sides.weights.shards[name]
    mask = unpack_mask(sides.state.masks[name], (shard.numel,))
    free = unpack_mask(sides.free[name], (shard.numel,))
    keep, stay, size = sides.keep[name], sides.stay[name], magnitude(shard)
    return Runs(
        name,
        shard.offset,
        shard.numel,
        shard.shape[-1],
        shard.flat.device,
        lambda at: {
            "mask": mask[at],
            "free": free[at],
            "keep": keep(at),
            "stay": stay(at),
            "magnitude": size(at),
        },
    )
