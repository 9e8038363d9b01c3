"""Two steps of GRPO whose groups are sampled under two masks, inside a rank."""

from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.models.loading import load_tokenizer
from tests.distributed.grpo_jobs import deepspeed_arguments, forget_engine
from tests.unit.tiny_models import tiny
from tests.unit.two_mask_trainers import GREEDY, schedule, two_mask_trainer

BATCH_SIZE = 8  # completions of a step, over all ranks: two prompts, four completions each


def two_steps(rank: int, world_size: int, layout: str, folder: str) -> dict[str, Any]:
    """Samples greedily, so that a batch does not depend on who draws it.

    The second step comes after a refinement, and is sampled under the refined mask and the next.

    Returns:
        Of this rank: the batches as scored, of each completion its tokens and what the loss needs;
        and, the same on every rank, the logs, which terms act, the second mask's sparsities and
        what of the masks was left behind. On rank 0 also how far training moved the weights.
    """
    forget_engine()
    tokenizer = load_tokenizer("bundled")
    trainer = two_mask_trainer(
        tokenizer,
        Path(folder),
        options={"teacher": tiny(tokenizer, 1), "teacher_kl_weight": 0.3},
        plan=schedule(begin_step=0, end_step=3, every_steps=1, regrow_fraction=0.1),
        per_device_train_batch_size=BATCH_SIZE // world_size // 2,
        gradient_accumulation_steps=2,
        optim="sgd",
        learning_rate=0.1,
        max_grad_norm=0.0,
        scale_rewards="none",
        **GREEDY,
        **deepspeed_arguments(layout),
    )
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.accelerator.num_processes == world_size
    callback = trainer.sparsity
    masks = {name: mask for name, mask in callback.state.whole_masks(callback.weights) if rank == 0}
    after = _weights(trainer)
    found = {
        "batches": [_completions(batch) for batch in trainer.scored],
        "logs": [
            {key: value for key, value in log.items() if key.split("/")[0] in ("masks", "rewards")}
            for log in trainer.state.log_history[:2]
        ],
        "acts": trainer.acting_terms.found,
        "moved": {name: before[name] - weight.cpu() for name, weight in after.items()},
        "masks": masks,
        "alive": {name: int((after[name].cpu()[~mask] != 0).sum()) for name, mask in masks.items()},
    }
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()
    forget_engine()
    return found


def _weights(trainer) -> dict[str, Tensor]:
    if trainer.is_deepspeed_enabled:
        return trainer.accelerator.get_state_dict(trainer.deepspeed) or {}
    return trainer.accelerator.unwrap_model(trainer.model).state_dict()


def _completions(batch: dict[str, Tensor]) -> list[tuple[list[int], bool, float, list[float]]]:
    """Tokens, whether the sparser mask sampled them, advantage, and their old log-probabilities."""
    lengths = batch["completion_mask"].sum(1).tolist()
    return [
        (
            batch["completion_ids"][row, :length].tolist(),
            bool(batch["is_sparser"][row]),
            batch["advantages"][row].item(),
            batch["sparser_log_probs"][row, :length].tolist(),
        )
        for row, length in enumerate(lengths)
    ]
