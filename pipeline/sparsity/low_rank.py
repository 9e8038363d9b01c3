"""A linear layer whose weight is a frozen matrix plus a masked low-rank product.

    dense proposal    P = W + s B A              LoRA (Hu et al. 2021, arXiv 2106.09685, eq. 3)
    effective weight  E = mask * P               y = x E^T + bias
    gradients         G = (dL/dy)^T x, masked    dL/dB = s G A^T,  dL/dA = s B^T G

LoRA's own forward, x W^T + s (x A^T) B^T, never forms the product, and so cannot mask it: the
product is dense, and what it adds at pruned places would come back with every merge. Here it is
formed, masked, used and dropped, and formed again for the gradient. Autograd keeps x, the factors
and the packed mask, never a matrix of the weight's size.

Memory beyond that, for one matrix at a time, forwards as backwards: 5.5 bytes an element (E or G in
fp32, and a mask being unpacked); under autocast, where E is rounded, 6. Time: 2 r multiply-adds an
element of W, and E written and read, in every forward pass, whatever the number of tokens; so
generation, a pass for each token, pays most.

E is formed in fp32 (fp64 if a factor is) and then rounded to the type that computes, also under
autocast: the merged weight that is saved is this very E. Left out: dropout between x and A, under
which the product is no matrix; second derivatives.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.sparsity.masks import unpack_mask


def proposal(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float) -> Tensor:
    """W + s B A, a new fp32 (or fp64) tensor of the weight's shape.

    Args:
        weight: W, (out, in), any floating type.
        lora_a: A, (r, in).
        lora_b: B, (out, r).
        scale: s.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    dense = weight.detach().to(dtype, copy=True)
    return dense.addmm_(lora_b.detach().to(dtype), lora_a.detach().to(dtype), alpha=scale)


def effective_weight(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, mask: Tensor
) -> Tensor:
    """Mask * (W + s B A): `proposal` with exact zeros where the packed mask has none set."""
    return _zero_pruned(proposal(weight, lora_a, lora_b, scale), mask)


class MaskedLowRankLinear(torch.autograd.Function):
    """y = x (mask * (W + s B A))^T + bias, with gradients for x, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        mask: Tensor,
        scale: float,
        bias: Tensor | None,
    ) -> Tensor:
        """(..., in) to (..., out), in autocast's type where it is on, else in the input's."""
        ctx.save_for_backward(hidden, weight, lora_a, lora_b, mask)
        device = hidden.device.type
        on = torch.is_autocast_enabled(device)
        ctx.scale, ctx.dtype = scale, torch.get_autocast_dtype(device) if on else hidden.dtype
        with torch.autocast(device, enabled=False):
            effective = effective_weight(weight, lora_a, lora_b, scale, mask).to(ctx.dtype)
            bias = None if bias is None else bias.to(ctx.dtype)
            return F.linear(hidden.to(ctx.dtype), effective, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple:
        """The gradients above; the product is formed again."""
        hidden, weight, lora_a, lora_b, mask = ctx.saved_tensors
        grad_hidden = grad_a = grad_b = None
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                effective = effective_weight(weight, lora_a, lora_b, ctx.scale, mask).to(ctx.dtype)
                grad_hidden = (grad_output @ effective).to(hidden.dtype)
                del effective
            if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
                rows = grad_output.reshape(-1, grad_output.shape[-1])
                inputs = hidden.reshape(-1, hidden.shape[-1]).to(ctx.dtype)
                dtype = torch.promote_types(weight.dtype, torch.float32)
                gradient = _zero_pruned((rows.T @ inputs).to(dtype), mask)
                grad_a = (ctx.scale * (lora_b.to(dtype).T @ gradient)).to(lora_a.dtype)
                grad_b = (ctx.scale * (gradient @ lora_a.to(dtype).T)).to(lora_b.dtype)
        return grad_hidden, None, grad_a, grad_b, None, None, None


def _zero_pruned(dense: Tensor, mask: Tensor) -> Tensor:
    """Sets pruned elements to exactly +0, NaN included, in place."""
    return dense.masked_fill_(unpack_mask(mask, dense.shape).logical_not_(), 0.0)
