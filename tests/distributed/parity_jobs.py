"""Training under refinement on one recorded batch sequence, in any layout; what a rank does of it.

Floating-point sums depend on their order, and layouts can agree only as far as their orders do.
Three things are therefore the same in all of them, after which they agree bit for bit:

- Each batch is two halves, whoever computes them. One process adds the gradients of both, as two
  ranks do; a sum of two has one order.
- Every norm takes a copy of its input. ZeRO-3 wraps each module in functions that collect the
  norm's gradients before they are added to the residual's; with the copy every layout does.
- Gradients are not clipped. Their norm is a sum over ranks in ZeRO, and over tensors elsewhere,
  and its last bit scales all gradients.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.masks import unpack_mask
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import Refinement, RefinementRule, refine
from pipeline.sparsity.scores import keep_scores
from pipeline.sparsity.shards import ShardedWeights
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.storage import load_state, save_state
from pipeline.sparsity.threshold import masks_by_score
from tests.distributed.layouts import BATCH_SIZE, MAX_NORM, Training, train_as

NUM_STEPS = 20
LEARNING_RATE = 1e-3
START_SPARSITY = 0.5
SPARSITY_AFTER = {4: 0.6, 8: 0.7, 12: 0.75, 16: 0.75}
"""Optimizer step after which the mask is refined, to which sparsity."""
LAST_SPARSITY = 0.8
"""Of the refinement right before answers are generated."""
REGROW_FRACTION = 0.1
RULE = RefinementRule(
    scope="matrix", score="mix", movement_weight=0.5, protect_steps=4, min_density=0.0
)
OBSERVED = MovementRule(half_life_steps=10.0)
VOCABULARY, LENGTH = 64, 16

MASK, MOVEMENT, REGROWN, SCORE = range(4)
"""Rows of what is recorded of each weight: 1 = kept; S; step at which it regrew, else -1; score of
a kept weight."""

Parts = dict[str, tuple[int, Tensor]]
"""Name to first element and fp32 (4, numel) of this rank's shard."""


@dataclass
class Record:
    """What one rank held."""

    shapes: dict[str, torch.Size]
    is_divided: bool
    moments: list[Parts] = field(default_factory=list)
    """Before each refinement, and at the end."""
    refinements: list[Refinement] = field(default_factory=list)


def llama(*, same_order: bool = True) -> LlamaForCausalLM:
    """215,040 prunable values, the same on every rank; two ranks of ZeRO-1 or 2 cut a weight."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=288,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for module in model.modules():
        if same_order and isinstance(module, LlamaRMSNorm):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(),))
    return model


def tokens(index: int) -> Tensor:
    """Recorded batch number `index`, int64 (12, 16): arithmetic progressions, to be learned."""
    generator = torch.Generator().manual_seed(index)
    first = torch.randint(VOCABULARY, (BATCH_SIZE, 1), generator=generator)
    stride = torch.randint(1, 8, (BATCH_SIZE, 1), generator=generator)
    return (first + stride * torch.arange(LENGTH)) % VOCABULARY


def train(
    rank: int,
    world_size: int,
    layout: str,
    num_pieces: int = 2,
    same_order: bool = True,
    max_norm: float = 0.0,
    fault: str | None = None,
    folder: str | None = None,
) -> Record:
    """Twenty steps with four refinements.

    Args:
        rank: Of this process.
        world_size: Divides `num_pieces`.
        layout: A key of `LAYOUTS`.
        num_pieces: Into how many parts each batch is cut, over all ranks.
        same_order: Whether norms take a copy of their input.
        max_norm: To which gradients are clipped; 0: not at all.
        fault: `offset` or `start`: what of every shard is one too low, unless it is 0.
        folder: Where the state is saved at the end.
    """
    model = llama(same_order=same_order)
    weights = prunable_weights(model)
    with train_as(layout, model, weights, rank, world_size, max_norm) as run:
        if fault is not None:
            for name, shard in run.sharded.shards.items():
                shifted = {fault: max(0, getattr(shard, fault) - 1)}
                run.sharded.shards[name] = replace(shard, **shifted)
        record, state = _train(run, num_pieces, max_norm)
        if folder is not None:
            save_state(Path(folder), state, run.sharded)
        return record


def reload(rank: int, world_size: int, layout: str, folder: str, again: str | None) -> Record:
    """Loads a state into a fresh model, and saves it into another folder."""
    model = llama()
    with train_as(layout, model, prunable_weights(model), rank, world_size) as run:
        state = load_state(Path(folder), run.sharded)
        if again is not None:
            save_state(Path(again), state, run.sharded)
        return Record(
            run.sharded.shapes, run.sharded.group is not None, [_observe(state, run.sharded)]
        )


def generate(
    rank: int, world_size: int, layout: str
) -> tuple[list[int], dict[str, Tensor], dict[str, Tensor | None]]:
    """Trains, refines once more, and answers greedily with no step between.

    Returns:
        The answer; each prunable weight as its layer used it for the last token; and on the first
        rank the masks.
    """
    model = llama()
    names = {weight: name for name, weight in prunable_weights(model).items()}
    with train_as(layout, model, prunable_weights(model), rank, world_size) as run:
        _, state = _train(run, num_pieces=2, max_norm=MAX_NORM)
        refine(
            state, run.sharded, RULE, sparsity=LAST_SPARSITY, regrow_fraction=0.0, step=NUM_STEPS
        )
        used: dict[str, Tensor] = {}
        for module in model.modules():
            if isinstance(module, nn.Linear) and module.weight in names:
                module.register_forward_pre_hook(
                    lambda module, _: used.update({names[module.weight]: module.weight.clone()})
                )
        model.eval()
        prompt = tokens(0)[:1, :4]
        with torch.no_grad():
            answer = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False
            )
        return answer[0].tolist(), used, dict(state.whole_masks(run.sharded))


def _train(run: Training, num_pieces: int, max_norm: float) -> tuple[Record, SparsityState]:
    for group in run.sharded.optimizer.param_groups:
        group["lr"] = LEARNING_RATE
    magnitudes = {name: weight.abs() for name, weight in run.whole_weights().items()}
    masks = masks_by_score(magnitudes, START_SPARSITY, RULE.scope)
    state = SparsityState.from_masks(masks, run.sharded)
    hooks = SparsityHooks(run.sharded, state, OBSERVED)
    record = Record(run.sharded.shapes, run.sharded.group is not None)
    for step in range(1, NUM_STEPS + 1):
        hooks.step = step
        _step(run, tokens(step).chunk(num_pieces)[run.rank :: run.world_size], max_norm)
        if step in SPARSITY_AFTER:
            record.moments.append(_observe(state, run.sharded))
            refinement = refine(
                state,
                run.sharded,
                RULE,
                sparsity=SPARSITY_AFTER[step],
                regrow_fraction=REGROW_FRACTION,
                step=step,
            )
            record.refinements.append(refinement)
    record.moments.append(_observe(state, run.sharded))
    hooks.remove()
    return record, state


def _step(run: Training, pieces: tuple[Tensor, ...], max_norm: float) -> None:
    """One optimizer step on this rank's pieces of a batch; under DeepSpeed there is one."""
    for piece in pieces:
        loss = run.engine(input_ids=piece, labels=piece).loss
        if run.optimizer is None:
            run.engine.backward(loss)
            run.engine.step()
        else:
            (loss / len(pieces)).backward()
    if run.optimizer is not None:
        if max_norm:
            nn.utils.clip_grad_norm_(run.model.parameters(), max_norm)
        run.optimizer.step()
        run.optimizer.zero_grad()


def _observe(state: SparsityState, sharded: ShardedWeights) -> Parts:
    scores = keep_scores(
        RULE.score, sharded, state, movement_weight=RULE.movement_weight, together=False
    )
    parts = {}
    for name, shard in sharded.shards.items():
        rows = torch.full((4, shard.numel), -1.0)
        rows[MASK] = unpack_mask(state.masks[name], (shard.numel,))
        rows[MOVEMENT] = state.movement[name]
        regrown = state.regrown[name]
        rows[REGROWN, regrown.indices.long()] = regrown.steps.float()
        rows[SCORE] = scores[name](slice(None))
        parts[name] = shard.offset, rows
    return parts
