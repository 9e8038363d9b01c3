"""What TRL would send to vLLM in the middle of a run, inside a rank."""

from pathlib import Path

from transformers import TrainerCallback
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from pipeline.models.loading import load_tokenizer
from pipeline.models.prunable import prunable_weights
from tests.distributed.grpo_jobs import deepspeed_arguments, forget_engine
from tests.unit.probe_prompts import short_distillation
from tests.unit.test_training import sparsity_of


class Sends(TrainerCallback):
    """After each step, the whole model as TRL's own code reads it for vLLM, on every rank."""

    def __init__(self, trainer):
        self.sent = []
        self.vllm = object.__new__(VLLMGeneration)  # its start asks for vLLM
        self.vllm.model, self.vllm.accelerator = trainer.model, trainer.accelerator
        self.vllm._dist = DistributedBackend(trainer.accelerator)

    def on_step_end(self, args, state, control, **kwargs):
        weights = self.vllm._iter_named_params()
        self.sent.append({name: weight.detach().cpu().clone() for name, weight in weights})


def send(rank, world_size, layout, folder):
    """Trains three steps, the first two of which end with another mask.

    Returns:
        After each step, name to weight as sent; the sparsity of each mask; the prunable names.
    """
    forget_engine()
    trainer = short_distillation(
        load_tokenizer("bundled"),
        folder,
        per_device_train_batch_size=4 // world_size,
        **deepspeed_arguments(layout),
    )
    names = list(prunable_weights(trainer.model))
    sparsity = sparsity_of(trainer.model, Path(folder) / f"prune-{rank}", end_step=2)
    trainer.add_sparsity(sparsity)
    sends = Sends(trainer)
    trainer.add_callback(sends)
    trainer.train()
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()
    forget_engine()
    return sends.sent, [entry["target"] for entry in sparsity.refinements], names
