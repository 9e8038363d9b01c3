"""EntroDrop-style: whole attention or MLP blocks by how much entropy they add to the hidden state.

A block adds its output to the residual stream, x_after = x_before + block(x_before). With the
calibration tokens as the sample, each channel j of the stream has a histogram, and

    H(x) = mean over channels j of -sum over bins k of p_jk log p_jk       (nats)
    increase of a block = H(x_after) - H(x_before)

The blocks with the smallest increase are dropped, all of their matrices at once. The residual
passes a dropped block unchanged, but for a bias of o_proj or down_proj, which masks do not reach.

Source: the idea of EntroDrop (arXiv 2504.03794), whose abstract leaves the estimate open.
Assumptions: NUM_BINS bins of equal width a channel, from the smallest to the largest value the
channel takes before or after the block. One set of bins for both makes the increase exactly 0 where
a block adds nothing, and lets growth count, not only the shape of the distribution. Increases are
measured once, in the dense model; attention and MLP blocks compete. On a small arithmetic Llama the
order of its six blocks is nearly that of the KL which dropping each costs, and
the same with 16 and 256 bins; with bins of its own for each state, the last MLP, 0.88 nats, would
have gone first.

Every layer runs twice over the batches, first for the bounds of the bins, then to count. So beside
the hidden states on their way from layer to layer only those of one batch exist, and counts do not
depend on how the set is cut.

Left out: measuring again after each drop; sparing the first layers whatever their increase.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers.models.llama import LlamaForCausalLM

from pipeline.errors import UserError
from pipeline.models.prunable import decoder_layers, prunable_weights
from pipeline.pruning.batches import CalibrationBatch
from pipeline.pruning.calibration import (
    PROGRESS_DELAY_SECONDS,
    Stream,
    first_layer_input,
    real_tokens,
)

NUM_BINS = 64
TOKENS_AT_ONCE = 4096
"""Tokens whose bins are numbered at once, 8 bytes a channel."""


def block_masks(
    model: LlamaForCausalLM,
    batches: Sequence[CalibrationBatch],
    sparsity: float,
    progress: str | None = None,
) -> dict[str, Tensor]:
    """Chooses the attention and MLP blocks to drop. The model stays as it is.

    Args:
        model: A dense Llama in evaluation mode.
        batches: The calibration set. How it is cut into batches does not matter.
        sparsity: Fraction of zeros wanted among the prunable weights. Blocks go one by one, the
            smallest increase first; of the sparsities this passes through, at least one block
            dropped and one kept, the nearest is taken. Count the zeros in the masks to know it.
        progress: Name of a progress bar over the layers, shown if they take longer than a few
            seconds; None shows none.

    Returns:
        Weight name to (out, in) bool, all True or all False, on the model's device, in model order.

    Raises:
        UserError: The sparsity is positive and outside what can be reached, there is no calibration
            token, or a hidden state is not finite.
    """
    weights = prunable_weights(model)
    dropped: set[str] = set()
    if sparsity > 0:
        sizes: dict[str, int] = {}
        for name, weight in weights.items():
            sizes[_block(name)] = sizes.get(_block(name), 0) + weight.numel()
        increases = entropy_increases(model, batches, progress)
        dropped = set(_blocks_to_drop(increases, sizes, sparsity))
    return {
        name: torch.full_like(weight, _block(name) not in dropped, dtype=torch.bool)
        for name, weight in weights.items()
    }


@torch.no_grad()
def entropy_increases(
    model: LlamaForCausalLM, batches: Sequence[CalibrationBatch], progress: str | None = None
) -> dict[str, float]:
    """What each block adds to the entropy of the residual stream, mean over channels.

    Two forward passes.

    Args:
        model: In evaluation mode.
        batches: The calibration set.
        progress: Name of a progress bar over the layers; None shows none.

    Returns:
        Block (`model.layers.0.self_attn`, `model.layers.0.mlp`) to nats, in model order.

    Raises:
        UserError: There is no calibration token, or a hidden state is not finite.
    """
    used = [batch for batch in batches if batch.attention_mask.any()]
    if not used:
        raise UserError("task.num_calibration: there is no calibration token; set at least 1 row")
    streams = [first_layer_input(model, batch, "input_norm") for batch in used]
    increases = {}
    bar = {"desc": progress, "disable": progress is None, "delay": PROGRESS_DELAY_SECONDS}
    for index, layer in enumerate(tqdm(decoder_layers(model), **bar)):
        blocks = [_Histograms(f"model.layers.{index}.{block}") for block in ("self_attn", "mlp")]
        for stream in streams:
            _feed([block.widen for block in blocks], _residuals(layer, stream), stream)
        for stream in streams:
            residuals = _residuals(layer, stream)
            _feed([block.count for block in blocks], residuals, stream)
            stream.pruned = residuals[-1]
        increases |= {block.name: block.increase() for block in blocks}
    return increases


def _block(name: str) -> str:
    """`model.layers.0.mlp.up_proj.weight` is part of `model.layers.0.mlp`."""
    return name.rsplit(".", 2)[0]


def _residuals(layer: nn.Module, stream: Stream) -> list[Tensor]:
    """The residual stream (B, S, hidden) before a layer, after its attention, after its MLP."""
    between = []
    handle = layer.post_attention_layernorm.register_forward_pre_hook(
        lambda _, inputs: between.append(inputs[0])
    )
    try:
        after = layer(stream.pruned, **stream.layer_arguments)
    finally:
        handle.remove()
    return [stream.pruned, *between, after]


def _feed(
    receive: Sequence[Callable[[Tensor, Tensor], None]],
    residuals: Sequence[Tensor],
    stream: Stream,
) -> None:
    """Gives each block's receiver the tokens (n, hidden) before and after the block."""
    tokens = [real_tokens(residual, stream) for residual in residuals]
    for take, (before, after) in zip(receive, pairwise(tokens), strict=True):
        take(before, after)


class _Histograms:
    """The residual stream before and after one block, every channel in bins that both share."""

    def __init__(self, name: str):
        """`name`: the block's."""
        self.name = name
        self._low = self._high = None
        self._counts: list[Tensor | int] = [0, 0]

    def widen(self, before: Tensor, after: Tensor) -> None:
        """Makes the bins reach as far as these tokens (n, channels) do."""
        for tokens in (before, after):
            low, high = tokens.amin(0), tokens.amax(0)
            self._low = low if self._low is None else torch.minimum(self._low, low)
            self._high = high if self._high is None else torch.maximum(self._high, high)
        if not (self._low.isfinite() & self._high.isfinite()).all():
            raise UserError(
                f"calibration: a hidden state at {self.name} is not finite; set student.dtype to "
                "float32 or use other calibration rows"
            )

    def count(self, before: Tensor, after: Tensor) -> None:
        """Counts tokens (n, channels) that the bins reach."""
        width = torch.where(self._high > self._low, self._high - self._low, 1.0)
        offset = NUM_BINS * torch.arange(len(width), device=width.device)
        for state, tokens in enumerate((before, after)):
            for part in tokens.split(TOKENS_AT_ONCE):
                bins = ((part - self._low) / width * NUM_BINS).long().clamp(0, NUM_BINS - 1)
                self._counts[state] += (
                    bins.add_(offset).flatten().bincount(minlength=NUM_BINS * len(width))
                )

    def increase(self) -> float:
        """Entropy after the block less the entropy before it, mean over channels, in nats."""
        before, after = (_entropy(counts.view(-1, NUM_BINS)) for counts in self._counts)
        return after - before


def _entropy(counts: Tensor) -> float:
    """Mean entropy in nats of channels, from how often each of their bins was met.

    Args:
        counts: (channels, NUM_BINS) int64.
    """
    fractions = counts / counts.sum(1, keepdim=True).double()
    return torch.special.entr(fractions).sum(1).mean().item()


def _blocks_to_drop(
    increases: dict[str, float], sizes: dict[str, int], sparsity: float
) -> list[str]:
    """The blocks of smallest increase whose share of the weights is nearest to `sparsity`."""
    order = sorted(increases, key=increases.get)
    total = sum(sizes.values())
    reached = [zeros / total for zeros in accumulate(sizes[block] for block in order[:-1])]
    smallest, largest = round(reached[0], 4), round(reached[-1], 4)
    if not smallest <= sparsity <= largest:
        raise UserError(
            f"prune.sparsity: {sparsity}: dropping whole blocks reaches {smallest} to {largest} "
            f"here, {order[0]} going first and {order[-1]} staying; set a value between them, or "
            "another prune.method"
        )
    best = min(range(len(reached)), key=lambda i: abs(reached[i] - sparsity))
    return order[: best + 1]
