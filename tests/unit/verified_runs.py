"""Short runs of a tiny model whose masks are verified."""

import torch

from pipeline.artifacts import MASK_FILE
from pipeline.models.prunable import prunable_weights
from pipeline.rollouts import generate
from pipeline.sparsity.masks import save_masks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule
from pipeline.sparsity.schedule import RefinementSchedule
from pipeline.training.mask_choice import MaskReward
from pipeline.training.probe import ProbePrompt
from pipeline.training.sparse_trainer import Sparsity
from pipeline.training.verified_refinement import Verification
from tests.unit.tiny_models import tiny


def own_answers(tokenizer, max_new_tokens=4):
    """Thirty prompts; right is what the tiny model answers before training."""
    encoded = [tokenizer(f"{n % 7 + 1}@{n}=")["input_ids"] for n in range(10, 40)]
    completions = generate(
        tiny(tokenizer, 0), tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=30
    )
    answers = tokenizer.batch_decode(completions, skip_special_tokens=True)
    return [
        ProbePrompt(ids, answer, completion)
        for ids, answer, completion in zip(encoded, answers, completions, strict=True)
    ]


def verified_sparsity(model, tokenizer, folder, *, reward=None, verified=True, **schedule):
    """From a dense model to 95 %: one jump at step 2, unless a schedule says otherwise."""
    masks = {n: torch.ones_like(w, dtype=torch.bool) for n, w in prunable_weights(model).items()}
    folder.mkdir(exist_ok=True)
    if not (folder / MASK_FILE).exists():
        save_masks(folder / MASK_FILE, masks)
    values = {
        "start_sparsity": 0.0,
        "final_sparsity": 0.95,
        "begin_step": 1,
        "end_step": 2,
        "every_steps": 1,
        "regrow_fraction": 0.2,
    }
    verification = Verification(
        prompts=own_answers(tokenizer),
        verifier=lambda completion, answer: float(completion == answer),
        reward=reward or MaskReward(),
        max_new_tokens=4,
        batch_size=16,
    )
    return Sparsity(
        source=folder,
        schedule=RefinementSchedule(**(values | schedule)),
        rule=RefinementRule(
            scope="matrix", score="magnitude", movement_weight=0.5, protect_steps=0, min_density=0.0
        ),
        movement=MovementRule(half_life_steps=5.0),
        first_step=0,
        stage="distill",
        verification=verification if verified else None,
    )
