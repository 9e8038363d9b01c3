"""What the calibration tokens say about the input of a linear layer, summed batch by batch.

Products are taken in fp32 (fp64 for a fp64 model) per batch and added up in fp64, in place.

A layer with a bias needs moments about the means too: that is what is left to its weights beside a
free bias. To subtract the means from a finished sum would leave rounding errors of fp32 where the
inputs hardly vary, and a Hessian that is not positive. So each batch is centred before its product,
and batches a and b are joined by (Chan, Golub and LeVeque 1979)

    C = C_a + C_b + d dᵀ n_a n_b / (n_a + n_b),   d = mean_b - mean_a
"""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from pipeline.pruning.hessian import Hessian, damped_hessian, inverse_factor

BLOCK_INPUTS = 1024
"""Channels whose products with those after them are taken together."""
NEEDS = ("input_norm", "second_moment", "cross_moment")
"""Fields of `InputStatistics`; who needs one gets those before it too."""


@dataclass(frozen=True)
class InputStatistics:
    """Of one input, which several layers may read. All fp64."""

    input_norm: Tensor
    """(in,) L2 norm of each input channel over the tokens of the pruned stream."""
    second_moment: Tensor | None = None
    """(in, in) X_pᵀ X_p, summed over tokens."""
    cross_moment: Tensor | None = None
    """(in, in) X_pᵀ X_d, summed over tokens; row: pruned stream, column: dense stream."""
    centred: "InputStatistics | None" = None
    """The same with both moments about the means; with the cross moment of layers with a bias."""
    pruned_mean: Tensor | None = None
    """(in,) mean over the tokens of the pruned stream; comes with `centred`."""
    dense_mean: Tensor | None = None
    """(in,) the same of the dense stream."""

    @cached_property
    def hessian(self) -> Hessian:
        """H, see `hessian.py`."""
        return Hessian(damped_hessian(self.second_moment))

    @cached_property
    def inverse_factor(self) -> Tensor:
        """(in, in) U with UᵀU = H⁻¹, see `hessian.py`."""
        return inverse_factor(damped_hessian(self.second_moment))


class InputSums:
    """Adds batches up to `InputStatistics`."""

    def __init__(self, needs: str, has_bias: bool = False):
        """Starts without tokens.

        Args:
            needs: One of `NEEDS`.
            has_bias: Whether a layer that reads the input has a bias.
        """
        self._needs = needs
        self._is_centred = has_bias and needs == "cross_moment"
        self._square_sum = self._second = self._cross = 0.0
        self._num_tokens = 0
        self._means = (0.0, 0.0)

    def add(self, pruned: Tensor, dense: Tensor | None = None) -> None:
        """Adds (tokens, in) fp32 or fp64 inputs of the pruned and, if needed, the dense stream."""
        if self._needs == "input_norm":
            self._square_sum = _added(self._square_sum, pruned.square().sum(0))
            return
        if self._is_centred:
            if len(pruned) == 0:
                return
            pruned, dense = self._centre(pruned, dense)
        self._second = _added(self._second, _gram(pruned))
        if self._needs == "cross_moment":
            self._cross = _added(self._cross, pruned.T @ dense)

    def _centre(self, *streams: Tensor) -> list[Tensor]:
        """The streams less their means; moves the means of all tokens, and the moments with it."""
        num_old, num_new = self._num_tokens, len(streams[0])
        self._num_tokens += num_new
        means = [stream.double().mean(0) for stream in streams]
        if num_old:
            steps = [new - old for new, old in zip(means, self._means, strict=True)]
            factor = num_old * num_new / self._num_tokens
            self._second.addr_(steps[0], steps[0], alpha=factor)
            self._cross.addr_(steps[0], steps[1], alpha=factor)
        else:
            steps = means
        self._means = tuple(
            old + step * (num_new / self._num_tokens)
            for old, step in zip(self._means, steps, strict=True)
        )
        return [stream - mean.to(stream.dtype) for stream, mean in zip(streams, means, strict=True)]

    def statistics(self) -> InputStatistics:
        """Of all batches so far, of which there is at least one."""
        if self._needs == "input_norm":
            return InputStatistics(self._square_sum.sqrt())
        if not self._is_centred:
            cross = self._cross if self._needs == "cross_moment" else None
            return InputStatistics(self._second.diagonal().sqrt(), self._second, cross)
        pruned_mean, dense_mean = self._means
        outer = self._num_tokens * pruned_mean[:, None]
        second, cross = self._second + outer * pruned_mean, self._cross + outer * dense_mean
        centred = InputStatistics(self._second.diagonal().sqrt(), self._second, self._cross)
        norm = second.diagonal().sqrt()
        return InputStatistics(norm, second, cross, centred, pruned_mean, dense_mean)


def _gram(inputs: Tensor) -> Tensor:
    """XᵀX of (tokens, in) X, of which the blocks below the diagonal are copied."""
    num_inputs = inputs.shape[1]
    gram = inputs.new_empty(num_inputs, num_inputs)
    for start in range(0, num_inputs, BLOCK_INPUTS):
        stop = start + BLOCK_INPUTS
        rows = inputs[:, start:stop].T @ inputs[:, start:]
        gram[start:stop, start:] = rows
        gram[stop:, start:stop] = rows[:, BLOCK_INPUTS:].T
    return gram


def _added(total: Tensor | float, part: Tensor) -> Tensor:
    """The fp64 sum, in place where there is one already."""
    return total.add_(part) if isinstance(total, Tensor) else part.double()
