"""SparseGPT: prune column by column, and let the columns to come make up for each loss.

Frantar & Alistarh 2023, arXiv 2301.00774. With H the damped Hessian of the layer's inputs and U the
upper triangular factor of its inverse, H⁻¹ = UᵀU (`hessian.py`), the columns of W are visited in
order. In the inverse Hessian of the columns from j on, U_jj² is the diagonal entry of column j and
U_jj U_jk are its others. So optimal brain surgery on them reads

    s_j = w_j² / U_jj²                                  score; high = keep
    e_j = w_j / U_jj if pruned, else 0                  error
    w_k -= e_j U_jk  for k > j                          compensation

Masks are adaptive: those of a run of columns are chosen from the weights as compensated so far,
just before its first column. A run is 128 columns whose weights all compete (`matrix`) or compete
within their row (`row`), or the M columns of `N:M`. Every run has the target sparsity; fractions of
a weight are carried to the next run, so the whole matrix has exactly the wanted number of zeros.

The update is this method's own redistribution: it reproduces X_p W, the dense layer on the inputs
of the pruned model, and never looks back at columns already visited.

One difference from the paper, which sets weights of dead input channels to 0: here they have score
0 and go first, and those that the target leaves keep their value, so that zeros stay exact.

Numerics: H and U in fp64, once for all layers that share an input; the sweep over columns in fp32
(fp64 for a fp64 model). Inside a block of about 128 columns each column gathers its compensation in
one matrix-vector product; the columns after the block get theirs in one matrix product.
"""

import torch
from torch import Tensor

from pipeline.pruning.input_statistics import InputStatistics
from pipeline.sparsity.groups import parse_n_m
from pipeline.sparsity.threshold import mask_by_score

BLOCK_COLUMNS = 128


def sparsegpt_weight(
    weight: Tensor, statistics: InputStatistics, sparsity: float, scope: str, name: str
) -> tuple[Tensor, Tensor]:
    """Mask and compensated weight of a linear layer.

    Args:
        weight: (out, in) dense weight.
        statistics: Of the layer's input, with its second moment.
        sparsity: Fraction of zeros, in [0, 1].
        scope: `matrix`, `row`, or `N:M` with in a multiple of M and sparsity 1 - N / M.
        name: The weight's name, which orders equal scores.

    Returns:
        Bool mask (out, in), True = kept, with round(sparsity x elements) zeros in the matrix, or
        round(sparsity x in) in each row, or M - N in each group; and the weight (out, in) in its
        dtype, exactly 0 where the mask is False.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    factor = statistics.inverse_factor.to(dtype)
    importance = (statistics.input_norm > 0) / statistics.inverse_factor.diagonal().square()
    columns = weight.detach().to(dtype).t().clone(memory_format=torch.contiguous_format)
    mask = torch.ones_like(columns, dtype=torch.bool)
    run = BLOCK_COLUMNS if scope in ("matrix", "row") else parse_n_m(scope)[1]
    block = max(run, BLOCK_COLUMNS // run * run)
    for start in range(0, len(columns), block):
        errors = torch.zeros_like(columns[start : start + block])
        stop = start + len(errors)
        for first in range(start, stop, run):
            done, here = slice(start, first), slice(first, min(first + run, stop))
            columns[here] -= factor[done, here].t() @ errors[: first - start]
            score = columns[here].square() * importance[here, None].to(dtype)
            if scope == "matrix":
                num_zeros = _zeros_between(here, sparsity, len(weight))
                mask[here] = mask_by_score(score, num_zeros, columns[here], name)
            else:
                mask[here] = _mask_in_rows(score, _zeros_between(here, sparsity, 1))
            errors[first - start : here.stop - start] = _sweep(
                columns[here], mask[here], factor[here, here]
            )
        columns[stop:] -= factor[start:stop, stop:].t() @ errors
    return mask.t().contiguous(), torch.where(mask, columns, 0.0).t().to(weight.dtype).contiguous()


def _zeros_between(columns: slice, sparsity: float, weights_per_column: int) -> int:
    """Zeros of a run, so that all runs up to any column have the rounded target together."""
    return round(sparsity * (columns.stop * weights_per_column)) - round(
        sparsity * (columns.start * weights_per_column)
    )


def _mask_in_rows(score: Tensor, num_zeros: int) -> Tensor:
    """Keeps all but the `num_zeros` lowest of each output row; of equal scores the later ones.

    Args:
        score: (columns, out).
        num_zeros: At most the number of columns.

    Returns:
        Bool (columns, out), True = kept.
    """
    rows = score.t().contiguous()
    lowest = rows.argsort(dim=1, stable=True)[:, :num_zeros]
    return torch.ones_like(rows, dtype=torch.bool).scatter_(1, lowest, False).t()


def _sweep(columns: Tensor, mask: Tensor, factor: Tensor) -> Tensor:
    """Compensates the columns of a run in order, in place.

    Args:
        columns: (columns, out): the run's weights, compensated for all columns before it.
        mask: (columns, out) bool, True = kept.
        factor: (columns, columns): the run's part of U.

    Returns:
        (columns, out) errors e.
    """
    errors = torch.where(mask, 0.0, 1.0 / factor.diagonal()[:, None])
    for column in range(len(columns)):
        if column:
            columns[column] -= factor[:column, column] @ errors[:column]
        errors[column] *= columns[column]
    return errors
