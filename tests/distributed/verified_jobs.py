"""A run whose masks are verified, inside a rank."""

from pathlib import Path

import torch

from pipeline.models.loading import load_tokenizer
from tests.distributed.grpo_jobs import deepspeed_arguments, forget_engine
from tests.unit.probe_prompts import short_distillation
from tests.unit.verified_runs import verified_sparsity

NEVER = 99


def decide(rank, world_size, layout, folder, schedule):
    """Trains four steps at a rate that hardly moves the model.

    Args:
        rank: Of this process.
        world_size: Ranks.
        layout: `plain`, `ddp`, `zero2` or `zero3`.
        folder: Of this layout; each rank uses its own part of it.
        schedule: Changes to the schedule's values; None: nothing is ever due.

    Returns:
        The decisions, and all that training left on this rank's shards, by name.
    """
    forget_engine()
    tokenizer = load_tokenizer("bundled")
    trainer = short_distillation(
        tokenizer,
        folder,
        max_steps=4,
        per_device_train_batch_size=4 // world_size,
        learning_rate=1e-6,
        **deepspeed_arguments(layout),
    )
    mine = Path(folder) / f"rank-{rank}"
    mine.mkdir(exist_ok=True)
    if schedule is None:
        values = {"verified": False, "begin_step": NEVER, "end_step": NEVER + 1}
    else:
        values = schedule
    sparsity = verified_sparsity(trainer.model, tokenizer, mine, **values)
    callback = trainer.add_sparsity(sparsity)
    trainer.train()
    found = {}
    for name, shard in callback.weights.shards.items():
        found[f"weight {name}"] = shard.weight.clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found[f"{key} {name}"] = callback.weights.moments(shard, key).clone()
        found[f"movement {name}"] = callback.state.movement[name]
        found[f"mask {name}"] = callback.state.masks[name]
    found["random"] = torch.get_rng_state()
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()
    forget_engine()
    return sparsity.refinements, found
