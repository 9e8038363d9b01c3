"""Masks and movement of weights that are a frozen matrix plus a trained low-rank product.

No optimizer steps such a weight, so nothing of it can be read inside a step. What training did to
it is read from the product's change since the last refinement, from the factors of then and now:

    P = W + s B A,  P' = W + s B' A'     now, and k steps ago
    S <- d^k S + (|P| - |P'|)            kept: how far training moved it away from zero
    S <- d^k S + (P - P')                pruned: how the value that it would have has changed

They are `displacement` and `proposed` of `movement.py`, with two differences: the steps between two
refinements decay together, and `proposed` is a difference of values, not divided by the learning
rate. A pruned weight sends no gradient to the factors, so its proposal moves only because it shares
them with kept weights; the choice among proposals is all that is claimed for it.

Refinement is that of `refine.py`, on the effective weights, with the same thresholds and rules. A
weight that is pruned is 0 by the mask alone; W keeps what it had. A weight that regrows comes back
with its proposal P, not with 0: it has no factor of its own to grow by from there, since whatever
trains it trains its whole row and column, and forcing a 0 means writing -s B A into W, which every
checkpoint would then have to carry. The function changes by that value at once, as it does where a
weight is pruned.

Elements are cut evenly among the ranks of a group at multiples of 8, whatever ZeRO does with W:

- at all times, of this rank's cut: movement, 4 bytes an element, and the mask, 1 bit; of all
  weights, for the forward pass: the mask, 1 bit; the factors of the last refinement, 4 r bytes for
  each row and column.
- while refining: two whole fp32 matrices of one weight, P and P', on every rank, so that the bits
  do not depend on the cut; then the scores of this rank's cut of it. Scope `model` compares all
  weights, so there this rank's cut of all effective weights is held too, 4 bytes an element.

Left out: `gradient`, `negative_gradient` and Fisher scores, which need a gradient for each weight.
A refinement that fails has refined the matrices before the one it names.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from pipeline.sparsity.collectives import communication_device
from pipeline.sparsity.low_rank import proposal
from pipeline.sparsity.masks import unpack_mask
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import Refinement, RefinementRule, refine
from pipeline.sparsity.shards import Shard, ShardedWeights
from pipeline.sparsity.state import SparsityState


class Factors(NamedTuple):
    """One weight, whole: W + s B A."""

    weight: Tensor
    """W, (out, in)."""
    lora_a: Tensor
    """A, (r, in)."""
    lora_b: Tensor
    """B, (out, r)."""
    scale: float
    """The number s."""


ReadFactors = Callable[[str], AbstractContextManager[Factors]]
"""Opens the factors of a name. Under ZeRO-3 that gathers them, so every rank calls it."""


def product_shards(
    shapes: dict[str, torch.Size],
    optimizer: torch.optim.Optimizer,
    group: ProcessGroup | None,
    device: torch.device,
) -> ShardedWeights:
    """An even cut of weights that no optimizer holds. Their `flat` is empty outside a refinement.

    Args:
        shapes: Name to shape (out, in), in model order.
        optimizer: The one that steps the factors.
        group: Ranks that share the work and the memory; None: this rank has all.
        device: Where masks and movement lie.
    """
    rank, world_size = (0, 1) if group is None else (dist.get_rank(group), group.size())
    empty = torch.empty(0, device=device)
    shards = {}
    for name, shape in shapes.items():
        part = 8 * -(-shape.numel() // (8 * world_size))
        offset = min(rank * part, shape.numel())
        numel = min(part, shape.numel() - offset)
        if numel:
            shards[name] = Shard(name, shape, offset, numel, empty, 0)
    return ShardedWeights(shards, dict(shapes), optimizer, group, lambda: None)


def whole_masks(weights: ShardedWeights, state: SparsityState) -> Iterator[tuple[str, Tensor]]:
    """The packed mask of every whole weight, on every rank, all of which walk through it.

    Yields:
        Name and uint8 (ceil(out * in / 8),). The state's own tensor where this rank has all.
    """
    for name, shape in weights.shapes.items():
        if weights.group is None:
            yield name, state.masks[name]
            continue
        world_size, num_bytes = weights.group.size(), (shape.numel() + 7) // 8
        device = communication_device(weights.group)
        sent = torch.zeros(-(-num_bytes // world_size), dtype=torch.uint8, device=device)
        if name in state.masks:
            sent[: state.masks[name].numel()] = state.masks[name]
        parts = [torch.empty_like(sent) for _ in range(world_size)]
        dist.all_gather(parts, sent, group=weights.group)
        yield name, torch.cat(parts)[:num_bytes]


class ProductMovement:
    """Movement of products, from refinement to refinement."""

    def __init__(
        self,
        weights: ShardedWeights,
        state: SparsityState,
        rule: MovementRule,
        read: ReadFactors,
        step: int,
        previous: dict[str, tuple[Tensor, Tensor]] | None = None,
    ):
        """Notes where the factors are now, or takes a note of earlier. Every rank calls it.

        Args:
            weights: From `product_shards`.
            state: Its masks and movement; the movement is changed in place.
            rule: `displacement` and `proposed`, in fp32.
            read: Opens the factors of a name.
            step: The present step, or that of the note.
            previous: Name to A and B of that step; None reads them.

        Raises:
            ValueError: The rule asks for what a product does not show.
        """
        if (rule.kept, rule.pruned) != ("displacement", "proposed"):
            raise ValueError(
                f"movement.kept, movement.pruned: {rule.kept}, {rule.pruned}: the weights of an "
                "adapter have no gradients of their own; set displacement and proposed"
            )
        self.weights, self.state, self.rule, self.read = weights, state, rule, read
        self.step = step
        self.previous = previous or {name: self._factors(name) for name in weights.shapes}

    @torch.no_grad()
    def observe(self, names: list[str], step: int) -> dict[str, Tensor]:
        """Adds the change since the last observation to the movement. Every rank calls it.

        Args:
            names: Of these weights, one after the other.
            step: The present step; `self.step` is the caller's to set once all are observed.

        Returns:
            Name to this rank's part of the effective weight, fp32 (numel,).
        """
        return {name: part for name in names if (part := self._observe(name, step)) is not None}

    def observed(self, step: int) -> SparsityState:
        """The state with all movement up to a step; the one here stays as it is.

        Every rank calls it. It takes 4 bytes for each element of this rank's cut.
        """
        movement = {name: values.clone() for name, values in self.state.movement.items()}
        state = replace(self.state, movement=movement)
        previous = dict(self.previous)
        twin = ProductMovement(self.weights, state, self.rule, self.read, self.step, previous)
        for name in self.weights.shapes:
            twin.observe([name], step)
        return state

    def _observe(self, name: str, step: int) -> Tensor | None:
        with self.read(name) as factors:
            now = proposal(*factors)
            before = proposal(factors.weight, *self.previous[name], factors.scale)
            self.previous[name] = _copied(factors)
        shard = self.weights.shards.get(name)
        if shard is None:
            return None
        cut = slice(shard.offset, shard.offset + shard.numel)
        kept = unpack_mask(self.state.masks[name], (shard.numel,))
        now, before = now.view(-1)[cut], before.view(-1)[cut]
        change = torch.where(kept, now.abs() - before.abs(), now - before)
        decay = self.rule.decay ** (step - self.step)
        self.state.movement[name].mul_(decay).add_(change.to(shard.flat.device))
        return torch.where(kept, now, 0.0).to(shard.flat.device)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        with self.read(name) as factors:
            return _copied(factors)


def refine_products(
    movement: ProductMovement,
    rule: RefinementRule,
    *,
    sparsity: float,
    regrow_fraction: float,
    step: int,
) -> Refinement:
    """Observes movement and refines the masks of its state in place. Every rank calls it.

    Arguments, result and errors as for `refine`; `rule.score` is not `fisher`.
    """
    weights, state = movement.weights, movement.state
    names = list(weights.shapes)
    total = torch.zeros(3, dtype=torch.int64)
    for together in [names] if rule.scope == "model" else [[name] for name in names]:
        effective = movement.observe(together, step)
        shards = {
            name: replace(weights.shards[name], flat=values) for name, values in effective.items()
        }
        shapes = {name: weights.shapes[name] for name in together}
        part = SparsityState(
            *(
                {name: values[name] for name in shards}
                for values in (state.masks, state.movement, state.regrown)
            )
        )
        done = refine(
            part,
            replace(weights, shards=shards, shapes=shapes),
            rule,
            sparsity=sparsity,
            regrow_fraction=regrow_fraction,
            step=step,
        )
        state.masks |= part.masks
        state.regrown |= part.regrown
        total += torch.tensor([done.pruned, done.regrown, done.survived])
    movement.step = step
    return Refinement(*total.tolist())


def _copied(factors: Factors) -> tuple[Tensor, Tensor]:
    return tuple(
        factor.detach().to(torch.float32, copy=True) for factor in (factors.lora_a, factors.lora_b)
    )
