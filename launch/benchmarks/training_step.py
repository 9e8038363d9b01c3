"""What share of a whole GRPO training step the engine adds.

The step: forward and backward of the policy loss on B completions of T tokens, in fp32 on a CPU
and under bf16 autocast on an accelerator; the gradient norm clipped; one fused AdamW step over all
parameters, with the engine in every second round. Sampling, rewards and the teacher's forward pass
are left out, so the real share is smaller. To the hooks is added one refinement in every
`REFINE_EVERY_STEPS`.

The engine's seconds are those of the optimizer step with it less those without: the difference of
two whole steps would drown in the noise of the backward pass.
"""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from launch.benchmarks.optimizer_step import HALF_LIFE_STEPS
from launch.benchmarks.shapes import Shape
from launch.benchmarks.timing import seconds, summary
from launch.benchmarks.workbench import LEARNING_RATE, SPARSITY
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.shards import plain_shards
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.threshold import masks_by_score

REFINE_EVERY_STEPS = 10
MAX_GRAD_NORM = 1.0


def policy_loss(model: LlamaForCausalLM, tokens: Tensor, advantages: Tensor) -> Tensor:
    """On-policy GRPO loss: the probability ratio is 1 and has a gradient.

    Args:
        model: The student.
        tokens: (B, T) int64, all of them scored.
        advantages: (B,).
    """
    logits = model(tokens, use_cache=False).logits[:, :-1]
    log_p = -torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(tokens.shape[0], -1)
    return -((log_p - log_p.detach()).exp() * advantages[:, None]).mean()


def training_step(shape: Shape, refinement_seconds: float, num_rounds: int) -> dict:
    """Seconds of a training step and of what the engine adds.

    Args:
        shape: Model, batch and sequence length.
        refinement_seconds: Of one refinement of this shape, measured in this run.
        num_rounds: Steps with the engine, and as many without.
    """
    device = torch.device(shape.device)
    torch.manual_seed(0)
    model = shape.model(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    weights = plain_shards(prunable_weights(model), optimizer)
    scores = {name: shard.weight.view(shard.shape).abs() for name, shard in weights.shards.items()}
    state = SparsityState.from_masks(masks_by_score(scores, SPARSITY, "matrix"), weights)
    rule = MovementRule(half_life_steps=HALF_LIFE_STEPS)
    tokens = torch.randint(
        shape.vocab_size, (shape.batch_size, shape.sequence_length), device=device
    )
    advantages = torch.randn(shape.batch_size, device=device)

    def forward_backward() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = policy_loss(model, tokens, advantages)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)

    backward: list[float] = []
    update: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * num_rounds + 2):
        with_engine = number % 2 == 0
        hooks = SparsityHooks(weights, state, rule) if with_engine else None
        taken = seconds(forward_backward, device), seconds(optimizer.step, device)
        if hooks:
            hooks.remove()
        if number > 1:
            backward.append(taken[0])
            update[with_engine].append(taken[1])
    return _shares(shape, backward, update, refinement_seconds)


def _shares(
    shape: Shape,
    backward: list[float],
    update: dict[bool, list[float]],
    refinement_seconds: float,
) -> dict:
    """The engine's seconds as fractions of a step without it."""
    added = [a - b for a, b in zip(update[True], update[False], strict=True)]
    hooks, whole = summary(added), summary(backward)["median"] + summary(update[False])["median"]
    refining = refinement_seconds / REFINE_EVERY_STEPS
    return {
        "batch_size": shape.batch_size,
        "sequence_length": shape.sequence_length,
        "forward_backward_seconds": summary(backward),
        "fused_adamw_seconds": summary(update[False]),
        "hooks_seconds": hooks,
        "refinement_seconds_per_step": refining,
        "step_seconds_without_engine": whole,
        "share_of_hooks": hooks["median"] / whole,
        "share": (hooks["median"] + refining) / whole,
    }
