"""Steps whose gradient is not finite: skipped, counted, and after three in a row the run stops.

DeepSpeed skips such a step itself. Without it the gradients are dropped before the optimizer sees
them, so neither weights nor moments nor movement change. The gradient norm decides, which every
rank computes alike. Which weight is to blame is only looked for once two steps were skipped: a
hook on each parameter's gradient, before clipping spreads one NaN to all.
"""

import logging
import math

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.ranks import gather_from_all

MAX_IN_A_ROW = 3

logger = logging.getLogger(__name__)


class SkippedSteps:
    """Counts skipped steps and names the weight when there are too many."""

    def __init__(self, model: nn.Module, stage: str):
        """`model`: the student, by whose parameter names a gradient is reported."""
        self.model = model
        self.stage = stage
        self.count = 0
        self._in_a_row = 0
        self._finite: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def check(self, grad_norm: float, step: int) -> bool:
        """Whether the gradient is usable.

        Args:
            grad_norm: Of all gradients before clipping; DeepSpeed gives inf or -1 for a bad one.
            step: The optimizer step that is about to be taken, from 1.

        Raises:
            UserError: It is the third step in a row that is not.
        """
        if math.isfinite(grad_norm) and grad_norm >= 0:
            self._in_a_row = 0
            self.remove()
            return True
        self.count += 1
        self._in_a_row += 1
        if self._in_a_row >= MAX_IN_A_ROW:
            raise UserError(
                f"{self.stage}.learning_rate: the gradient of {', '.join(self._culprits())} is not "
                f"finite at step {step}, the third in a row; set a lower rate, or a lower "
                f"{self.stage}.max_grad_norm, with --resume redo"
            )
        logger.warning("%s: step %d skipped, its gradient is not finite", self.stage, step)
        if self._in_a_row == MAX_IN_A_ROW - 1:
            self._watch()
        return False

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._finite.clear()

    def _watch(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                self._handles.append(
                    parameter.register_hook(lambda gradient, name=name: self._note(name, gradient))
                )

    def _note(self, name: str, gradient: Tensor) -> None:
        finite = torch.isfinite(gradient).all()
        self._finite[name] = self._finite.get(name, torch.ones_like(finite)) & finite

    def _culprits(self) -> list[str]:
        """The first weight, in model order, whose gradient was not finite on any rank."""
        mine = [name for name, finite in self._finite.items() if not finite]
        everywhere = {name for names in gather_from_all(mine) for name in names}
        found = [name for name, _ in self.model.named_parameters() if name in everywhere]
        return found[:1] or ["a weight"]
