"""The clipping suite: what a gradient norm that includes pruned weights does to each observation.

The norm that clips the gradients, c = min(1, max_norm / |g|), is taken over all parameters, and
gradients of pruned weights, which do not train, are part of it. Measured on the bundled Llama with
a magnitude mask at `SPARSITY`, distilled from its dense self by forward KL:

- which share of |g|^2 lies in pruned weights;
- how each observation would differ if the norm left them out (`kept`), or did not clip (`none`).

All arms see the same weights and the same raw gradients: before each step the weights of every arm
are set to those of the arm `all`, whose clipping is the usual one. Each arm has an Adam and the
engine's own hooks, so only c differs.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from launch.benchmarks.timing import summary
from pipeline.config_loading import load_config
from pipeline.evaluation.completions import CompletionBatch, completion_batches
from pipeline.models.prunable import apply_masks, prunable_weights
from pipeline.rollouts import sample_rollouts
from pipeline.sparsity.hooks import SparsityHooks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.shards import plain_shards
from pipeline.sparsity.state import SparsityState
from pipeline.sparsity.threshold import masks_by_score
from pipeline.stages.inputs import open_dense_student, open_task, open_teacher

ROOT = Path(__file__).resolve().parents[2]
SPARSITY = 0.9
MAX_NORM = 1.0
"""The default of TRL's `max_grad_norm`."""
LEARNING_RATE = 1e-3
HALF_LIFE_STEPS = 20.0
BATCH_SIZE = 64
CHANGED_FRACTION = 0.05
"""Of the kept weights: how many a refinement prunes and regrows, to compare the choices."""
ARMS = ("all", "kept", "none")
RULES = (("displacement", "proposed"), ("gradient", "negative_gradient"))
"""The proposed update is read before anything zeroes it, so its hooks come first."""


class Arm:
    """One way to clip: copies of the prunable weights, their Adam, and what the engine observes."""

    def __init__(self, weights: dict[str, Tensor], masks: dict[str, Tensor]):
        """Starts at the given weights with nothing observed."""
        self.parameters = {name: nn.Parameter(w.detach().clone()) for name, w in weights.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=LEARNING_RATE)
        self.weights = plain_shards(self.parameters, self.optimizer)
        self.states = []
        for kept, pruned in RULES:
            rule = MovementRule(kept=kept, pruned=pruned, half_life_steps=HALF_LIFE_STEPS)
            self.states.append(SparsityState.from_masks(masks, self.weights))
            SparsityHooks(self.weights, self.states[-1], rule)

    @torch.no_grad()
    def step(self, weights: dict[str, Tensor], gradients: dict[str, Tensor], factor: float) -> None:
        """Steps from the given weights with gradients times `factor`."""
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
            parameter.grad = gradients[name] * factor
        self.optimizer.step()

    def observed(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """Observation to its values for all kept, or all pruned, weights, fp32 (n,)."""

        def side(tensors: dict[str, Tensor], kept: bool) -> Tensor:
            return torch.cat(
                [t.reshape(-1)[masks[n].reshape(-1) == kept] for n, t in tensors.items()]
            )

        found = {}
        for (kept, pruned), state in zip(RULES, self.states, strict=True):
            found[kept], found[pruned] = (side(state.movement, on) for on in (True, False))
        fisher = {
            name: p.detach().abs() * self.optimizer.state[p]["exp_avg_sq"].sqrt()
            for name, p in self.parameters.items()
        }
        return found | {"fisher": side(fisher, True)}


def run(num_steps: int) -> dict:
    """Distils for a number of steps and compares the arms.

    Args:
        num_steps: Optimizer steps, at least 2.
    """
    torch.manual_seed(0)
    config = load_config(ROOT / "configs" / "quickstart.yaml", {})
    student, teacher = open_dense_student(config), open_teacher(config)
    weights = prunable_weights(student)
    masks = masks_by_score({n: w.detach().abs() for n, w in weights.items()}, SPARSITY, "matrix")
    apply_masks(student, masks)
    arms = {name: Arm(weights, masks) for name in ARMS}
    shares, factors = train(student, teacher, _batches(config, teacher, num_steps), masks, arms)
    reference = arms["all"].observed(masks)
    num_pruned = sum(int((~mask).sum()) for mask in masks.values())
    return {
        "sparsity": SPARSITY,
        "max_norm": MAX_NORM,
        "num_steps": num_steps,
        "learning_rate": LEARNING_RATE,
        "half_life_steps": HALF_LIFE_STEPS,
        "changed_fraction": CHANGED_FRACTION,
        "pruned_share_of_squared_norm": summary(shares),
        "pruned_share_of_parameters": num_pruned / sum(p.numel() for p in student.parameters()),
        "factors": {
            name: {**summary(values), "clipped_steps": sum(value < 1.0 for value in values)}
            for name, values in factors.items()
        },
        "observations": {
            name: {
                what: compare(values, reference[what], masks, what)
                for what, values in arms[name].observed(masks).items()
            }
            for name in ARMS[1:]
        },
    }


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Iterable[CompletionBatch],
    masks: dict[str, Tensor],
    arms: dict[str, Arm],
) -> tuple[list[float], dict[str, list[float]]]:
    """One optimizer step of every arm for each batch; the student follows the arm `all`.

    Returns:
        Share of |g|^2 in pruned weights, step by step, and each arm's c.
    """
    weights = prunable_weights(student)
    chosen = {id(weight) for weight in weights.values()}
    rest = [p for p in student.parameters() if id(p) not in chosen]
    rest_optimizer = torch.optim.AdamW(rest, lr=LEARNING_RATE)
    shares: list[float] = []
    factors: dict[str, list[float]] = {name: [] for name in arms}
    for batch in batches:
        student.zero_grad()
        _divergence(student, teacher, batch).backward()
        total = sum(float(p.grad.square().sum()) for p in student.parameters())
        inside = sum(float(w.grad[~masks[n]].square().sum()) for n, w in weights.items())
        shares.append(inside / total)
        norms = {"all": total**0.5, "kept": (total - inside) ** 0.5, "none": 0.0}
        gradients = {name: weight.grad for name, weight in weights.items()}
        for name, arm in arms.items():
            factors[name].append(min(1.0, MAX_NORM / max(norms[name], 1e-12)))
            arm.step(weights, gradients, factors[name][-1])
        for parameter in rest:
            parameter.grad.mul_(factors["all"][-1])
        rest_optimizer.step()
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(arms["all"].parameters[name])
    return shares, factors


def _batches(config, teacher: PreTrainedModel, num_steps: int) -> Iterator[CompletionBatch]:
    """One batch of sampled teacher completions for each step."""
    inputs = open_task(config)
    rollouts = sample_rollouts(
        teacher,
        inputs.tokenizer,
        inputs.task.train,
        inputs.encode,
        inputs.verifier,
        num_rollouts=num_steps * BATCH_SIZE,
        max_new_tokens=config.evaluate.max_new_tokens,
        batch_size=BATCH_SIZE,
        temperature=1.0,
        seed=0,
    )
    for start in range(0, len(rollouts), BATCH_SIZE):
        part = rollouts[start : start + BATCH_SIZE]
        yield from completion_batches(
            [(rollout.prompt_ids, rollout.completion_ids) for rollout in part], BATCH_SIZE
        )


def _divergence(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: CompletionBatch
) -> Tensor:
    """KL(p_teacher || p_student), nats per completion token."""

    def log_p(model: PreTrainedModel) -> Tensor:
        logits = model(batch.input_ids, attention_mask=batch.attention_mask).logits
        return logits[:, :-1][batch.is_completion[:, 1:]].log_softmax(-1)

    with torch.no_grad():
        wanted = log_p(teacher)
    return nn.functional.kl_div(log_p(student), wanted, log_target=True, reduction="batchmean")


def compare(values: Tensor, reference: Tensor, masks: dict[str, Tensor], what: str) -> dict:
    """How an observation differs from the one under the usual clipping.

    Args:
        values: fp32 (n,), of all weights of one side.
        reference: The same under the usual clipping.
        masks: For the number of weights that change side.
        what: Name of the observation: those of pruned weights are ranked by magnitude.

    Returns:
        `scale`: ratio of the norms; `rank_correlation`: Spearman's, of what is ranked;
        `same_choice`: share of the weights chosen by both, among as many as a refinement prunes or
        regrows.
    """
    scale = float(values.norm() / reference.norm())
    regrows = what in ("proposed", "negative_gradient")
    if regrows:
        values, reference = -values.abs(), -reference.abs()
    number = round(CHANGED_FRACTION * sum(int(mask.sum()) for mask in masks.values()))
    ranks = torch.stack([v.argsort().argsort().double() for v in (values, reference)])
    chosen = ranks < number
    return {
        "scale": scale,
        "rank_correlation": float(torch.corrcoef(ranks)[0, 1]),
        "same_choice": float((chosen[0] & chosen[1]).sum() / number),
    }


def show(result: dict) -> None:
    """Prints the shares and the comparison."""
    share = result["pruned_share_of_squared_norm"]
    low, high = share["quartiles"]
    print(
        f"pruned weights hold {share['median']:.3f} of |g|^2 (quartiles {low:.3f} to {high:.3f}) "
        f"and {result['pruned_share_of_parameters']:.3f} of the parameters"
    )
    for arm, found in result["factors"].items():
        print(
            f"norm over {arm}: median factor {found['median']:.3f}, {found['clipped_steps']} of "
            f"{result['num_steps']} steps clipped"
        )
    for arm, observations in result["observations"].items():
        for what, found in observations.items():
            print(
                f"{arm:5} {what:17} scale {found['scale']:.3f}, rank correlation "
                f"{found['rank_correlation']:.5f}, same choice {found['same_choice']:.4f}"
            )
