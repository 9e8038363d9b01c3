"""Muon for weight matrices and AdamW for the rest, as one optimizer.

Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by
the nearest orthogonal matrix. Its update is scaled to the size of AdamW's (Liu et al. 2025,
arXiv 2502.16982, section 2.2), so both take learning rates of one kind. A sparse student recovers
in several times fewer steps than with AdamW (RESULTS.md). torch's own implementations do the work.

Orthogonalising mixes all weights of a matrix: the gradient of a pruned weight would have a part in
the direction in which kept ones move. At 97 % zeros such parts are most of it, so the hooks keep
those gradients back (`sparsity/hooks.py`): Muon works on the matrix of the kept weights' gradients.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Two of torch's optimizers behind one `step`, with common `param_groups` and `state`."""

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        rest: Iterable[nn.Parameter],
        *,
        muon_learning_rate: float,
        learning_rate: float,
        betas: tuple[float, float],
        weight_decay: float,
    ):
        """Splits the work.

        Args:
            matrices: Two-dimensional parameters for Muon.
            rest: Parameters for AdamW, never decayed.
            muon_learning_rate: Of the matrices.
            learning_rate: Of the rest.
            betas: AdamW's.
            weight_decay: Of the matrices.
        """
        self.parts = [
            torch.optim.Muon(
                matrices,
                lr=muon_learning_rate,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(rest, lr=learning_rate, betas=betas, weight_decay=0.0),
        ]
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Updates every parameter that has a gradient."""
        for part in self.parts:
            part.step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Lets both parts see what `load_state_dict` has put here."""
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
