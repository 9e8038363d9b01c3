"""Wanda: magnitude times the norm of the input it meets (Sun et al. 2023, arXiv 2306.11695).

    s_ij = |W_ij| * ||X_j||_2

X_j is input channel j over the calibration tokens, in the model whose earlier layers are already
pruned. As in the paper, weights are compared within an output row by default (`scope="row"`), or
inside groups of M consecutive inputs (`scope="N:M"`), and kept weights stay as they are. Weights of
a dead input channel have score 0 and go first, the smallest magnitudes before the others.
"""

from torch import Tensor

from pipeline.pruning.magnitude import magnitude_score


def wanda_score(weight: Tensor, input_norm: Tensor) -> Tensor:
    """|W| times the norm of each input channel. High = keep.

    Args:
        weight: (out, in), any float dtype.
        input_norm: (in,) L2 norms over the calibration tokens.

    Returns:
        (out, in) fp32.
    """
    return magnitude_score(weight) * input_norm.float()
