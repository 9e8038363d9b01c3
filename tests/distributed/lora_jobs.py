"""A distill stage of a LoRA student from a folder to a folder, inside a rank."""

from pathlib import Path

import deepspeed
import torch
from datasets import Dataset
from torch import Tensor
from torch import distributed as dist
from trl import SFTConfig

from pipeline.config import Config
from pipeline.config_loading import load_config
from pipeline.models.loading import load_model, load_tokenizer
from pipeline.models.lora import lora_config, lora_layers
from pipeline.sparsity.low_rank_refine import product_shards, whole_masks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule
from pipeline.sparsity.schedule import RefinementSchedule
from pipeline.sparsity.state import SparsityState
from pipeline.stages.inputs import open_task
from pipeline.stages.training import train
from pipeline.training.distill_trainer import DistillTrainer
from pipeline.training.sparse_trainer import Sparsity
from tests.distributed.grpo_jobs import deepspeed_arguments, forget_engine
from tests.unit.tiny_models import tiny

BATCH_SIZE = 8
IDS = torch.tensor([[5, 13, 7, 15, 11, 12], [9, 15, 8, 4, 3, 2]])
SGD = {"optim": "sgd", "learning_rate": 2.0, "max_grad_norm": 0.0}
ADAM = {"learning_rate": 1e-2}
MEASURED = {
    "task.num_train": 8,
    "task.num_calibration": 8,
    "task.num_probe": 5,
    "task.num_test": 8,
    "evaluate.max_new_tokens": 2,
    "evaluate.every_steps": 5,
}


def stage(rank, world_size, layout, prune, out, optimizer, stops) -> list[dict]:
    """Trains to each of some steps, as a run that was stopped there would go on.

    Args:
        rank: Of this process.
        world_size: Ranks.
        layout: `plain`, `ddp`, or `zeroN` with any of `-persistent`, `-checkpointing`, `-bf16`,
            `-measured`: it keeps the best of its last two students, which are equally wrong.
        prune: Folder of a pruned student and its masks; read only.
        out: Folder of the stage, of all ranks together.
        optimizer: `SGD` or `ADAM`.
        stops: Last step of each part.

    Returns:
        For each part, of rank 0: `logits` of the trained model, `factors` of each weight, and
        `refinements`; of every rank `masks`, which its layers compute with.
    """
    return [_part(layout, Path(prune), Path(out), optimizer, stop) for stop in stops]


def cut(rank, world_size, masks: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Offset and size of this rank's parts, and the masks put together from all ranks'."""
    shapes = {name: mask.shape for name, mask in masks.items()}
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    weights = product_shards(shapes, optimizer, dist.group.WORLD, torch.device("cpu"))
    state = SparsityState.from_masks(masks, weights)
    ranges = {name: (shard.offset, shard.numel) for name, shard in weights.shards.items()}
    return ranges, dict(whole_masks(weights, state))


def _part(layout: str, prune: Path, out: Path, optimizer: dict, stop: int) -> dict:
    forget_engine()
    deepspeed.init_distributed("gloo", verbose=False)  # takes over the group that there is
    tokenizer = load_tokenizer("bundled")
    arguments = _arguments(layout, out, optimizer, stop)
    rows = [[5 + i % 5, 13, 7, *range(20, 21 + i % 7), 1] for i in range(64)]
    trainer = DistillTrainer(
        model=load_model(str(prune / "model")),
        args=arguments,
        train_dataset=Dataset.from_dict(
            {"input_ids": rows, "labels": [[-100] * 3 + row[3:] for row in rows]}
        ),
        processing_class=tokenizer,
        peft_config=lora_config(r=2, alpha=4.0),
        teacher=tiny(tokenizer, 1),
        kl_weight=1.0,
        ce_weight=0.5,
    )
    sparsity = Sparsity(
        source=prune,
        schedule=RefinementSchedule(
            start_sparsity=0.5,
            final_sparsity=0.75,
            begin_step=1,
            end_step=5,
            every_steps=2,
            regrow_fraction=0.2,
        ),
        rule=RefinementRule(
            scope="matrix", score="mix", movement_weight=0.5, protect_steps=2, min_density=0.0
        ),
        movement=MovementRule(kept="displacement", half_life_steps=5.0),
        first_step=0,
        stage="distill",
    )
    config, inputs = Config(), None
    if layout.endswith("measured"):
        config = load_config("configs/quickstart.yaml", MEASURED)
        inputs = open_task(config)
    done = train(config, inputs, trainer, sparsity, out, None)
    found = _found(trainer) | {"done": done}
    if trainer.is_deepspeed_enabled:
        trainer.deepspeed.destroy()
    forget_engine()
    return found | {"refinements": sparsity.refinements}


def _found(trainer: DistillTrainer) -> dict:
    callback = trainer.sparsity
    model = trainer.deepspeed if trainer.is_deepspeed_enabled else trainer.model
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=IDS).logits.float()
    factors: dict[str, list[Tensor]] = {}
    for name in callback.weights.shapes:
        with callback._read(name) as whole:
            factors[name] = [f.detach().float().clone() for f in whole[:3]]
    layers = lora_layers(trainer.accelerator.unwrap_model(trainer.model))
    masks = {name: layer.mask.clone() for name, layer in layers.items()}
    gathered = dict(whole_masks(callback.weights, callback.state))
    assert all(torch.equal(masks[name], gathered[name]) for name in masks)
    return {"logits": logits, "factors": factors, "masks": masks}


def _arguments(layout: str, out: Path, optimizer: dict, stop: int) -> SFTConfig:
    engine, *options = layout.split("-")
    settings = deepspeed_arguments(engine)
    if "persistent" in options:
        del settings["deepspeed"]["zero_optimization"]["stage3_param_persistence_threshold"]
    if "bf16" in options:
        settings["deepspeed"]["bf16"] = {"enabled": "auto"}
    world_size = 1 if engine == "plain" else 2
    return SFTConfig(
        output_dir=str(out),
        max_steps=stop,
        per_device_train_batch_size=BATCH_SIZE // world_size,
        lr_scheduler_type="constant",
        save_steps=4,
        report_to="none",
        use_cpu=True,
        bf16="bf16" in options,
        gradient_checkpointing="checkpointing" in options,
        disable_tqdm=True,
        **optimizer,
        **settings,
    )
