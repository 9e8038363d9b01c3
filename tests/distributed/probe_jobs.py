"""Prompts answered in the middle of a real training run, inside a rank."""

from transformers import TrainerCallback

from pipeline.models.loading import load_tokenizer
from pipeline.training.probe import Probe
from tests.distributed.grpo_jobs import deepspeed_arguments, forget_engine
from tests.unit.probe_prompts import prompts_for, short_distillation


def ask(rank, world_size, layout, folder, asks=True):
    """Trains, asks after every step, and asks a whole copy of the last model alone.

    Returns:
        Answers and log-probabilities after each step; those of the copy, on rank 0; its weights.
    """
    forget_engine()
    tokenizer = load_tokenizer("bundled")
    trainer = short_distillation(
        tokenizer,
        folder,
        per_device_train_batch_size=4 // world_size,
        learning_rate=1e-3,
        **deepspeed_arguments(layout),
    )
    probe = probe_of(trainer, tokenizer)
    seen = []

    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((probe.correct().tolist(), probe.log_probs()))

    if asks:
        trainer.add_callback(Asks())
    trainer.train()
    assert trainer.accelerator.num_processes == world_size
    if trainer.is_deepspeed_enabled:
        weights = trainer.accelerator.get_state_dict(trainer.deepspeed) or {}
        trainer.deepspeed.destroy()
    else:
        weights = trainer.accelerator.unwrap_model(trainer.model).state_dict()
    weights = {name: weight.detach().cpu().clone() for name, weight in weights.items()}
    forget_engine()
    return seen, weights


def ask_alone(rank, world_size, weights, folder):
    """What one process finds with given weights."""
    forget_engine()
    tokenizer = load_tokenizer("bundled")
    trainer = short_distillation(tokenizer, folder)
    trainer.model.load_state_dict(weights)
    probe = probe_of(trainer, tokenizer)
    return probe.correct().tolist(), probe.log_probs()


def probe_of(trainer, tokenizer):
    """Seven prompts in batches of two: an odd number of each."""
    prompts = prompts_for(tokenizer)
    return Probe(trainer, prompts, _exact, max_new_tokens=4, batch_size=2)


def _exact(completion, answer):
    return float(completion == answer)
