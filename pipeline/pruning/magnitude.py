"""Scores that look at the weights alone: magnitude and its two controls. High = keep.

- magnitude (Han et al. 2015, arXiv 1506.02626): |W|.
- negative magnitude: -|W|, the paper's control "-weights".
- random: uniform in [0, 1), the control that knows nothing.
"""

import hashlib

import torch
from torch import Tensor


def magnitude_score(weight: Tensor) -> Tensor:
    """|W|. (out, in) any float dtype -> (out, in) fp32."""
    return weight.detach().float().abs()


def negative_magnitude_score(weight: Tensor) -> Tensor:
    """-|W|. (out, in) any float dtype -> (out, in) fp32."""
    return -magnitude_score(weight)


def random_score(weight: Tensor, name: str, seed: int) -> Tensor:
    """Uniform in [0, 1), drawn from a generator of this weight's own.

    Args:
        weight: (out, in); gives shape and device.
        name: The weight's name. With the seed it fixes the draw, so neither the order nor the
            number of weights matters.
        seed: The run's seed.

    Returns:
        (out, in) fp32.
    """
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.rand(weight.shape, generator=generator).to(weight.device)
