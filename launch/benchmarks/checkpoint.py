"""The checkpoint suite: what masks and movement add to saving, what resuming adds to loading.

One Llama with random weights in one process, trained by AdamW for two steps. Saving is timed in
turn with the engine's files and without. Loading is reading weights, moments, masks and movement
once, from files that are in the system's cache; resuming is everything from the search for a whole
checkpoint, whose every byte is hashed, to the first step. `--help` and a mistake are timed as
processes.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback

from launch.benchmarks.shapes import Shape
from pipeline.artifacts import MASK_FILE
from pipeline.config_loading import load_config
from pipeline.models.loading import load_tokenizer
from pipeline.models.prunable import apply_masks, prunable_weights
from pipeline.sparsity.masks import save_masks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule
from pipeline.sparsity.threshold import masks_by_score
from pipeline.training import sparse_trainer
from pipeline.training.arguments import distill_arguments
from pipeline.training.checkpoint import newest_whole_checkpoint, read_note
from pipeline.training.distill_trainer import DistillTrainer
from pipeline.training.sparse_trainer import Sparsity

ROOT = Path(__file__).resolve().parents[2]
SHAPE = Shape(hidden_size=768, intermediate_size=2048, num_layers=4, num_heads=12, vocab_size=128)
ENGINE_FILES = ("sparsity-*.safetensors", "trained-*.json")
STEPS, ROUNDS = 2, 15
COMMANDS = {
    "help": ["--help"],
    "mistake": ["--config", "configs/quickstart.yaml", "--prune.sparsty", "0.5"],
}


class FirstStep(TrainerCallback):
    """When training first began a step."""

    at: float | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        """Reads the clock."""
        self.at = self.at or time.perf_counter()


def run() -> dict:
    """Seconds and bytes of a checkpoint and the engine's part; seconds of resuming and loading."""
    torch.manual_seed(0)
    result: dict = {"movement": {}}
    for dtype in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            result["movement"][dtype] = _one(Path(folder), getattr(torch, dtype))
    result["prunable_weights"] = sum(s.numel() for s in SHAPE.prunable_shapes().values())
    result["process_seconds"] = {name: _process(words) for name, words in COMMANDS.items()}
    return result


def _one(folder: Path, dtype: torch.dtype) -> dict:
    """Saves, and resumes, with movement in one type."""
    model = SHAPE.model("cpu")
    scores = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    masks = masks_by_score(scores, 0.9, "matrix")
    apply_masks(model, masks)
    save_masks(folder / MASK_FILE, masks)
    saving = _timed_saving(_trainer(folder, model, dtype, STEPS)[0])
    checkpoint = folder / f"checkpoint-{STEPS}"
    engine = sum(path.stat().st_size for kind in ENGINE_FILES for path in checkpoint.glob(kind))
    whole = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())

    started = time.perf_counter()
    for path in checkpoint.glob("*.safetensors"):
        load_file(path)
    torch.load(checkpoint / "optimizer.pt", weights_only=True)
    loading = time.perf_counter() - started

    trainer, sparsity = _trainer(folder, SHAPE.model("cpu"), dtype, STEPS + 1)
    first = FirstStep()
    trainer.add_callback(first)
    started = time.perf_counter()
    found = newest_whole_checkpoint(folder)
    trainer.accept_topology(found, read_note(found), "distill")
    sparsity.resume(found)
    trainer.args.save_strategy = "no"
    trainer.train(resume_from_checkpoint=str(found))
    return {
        "bytes": {"checkpoint": whole, "engine": engine, "added": engine / (whole - engine)},
        "seconds": saving,
        "resume_seconds": {"resuming": first.at - started, "loading": loading},
    }


def _trainer(
    folder: Path, model: LlamaForCausalLM, dtype: torch.dtype, steps: int
) -> tuple[DistillTrainer, Sparsity]:
    """A distillation of a model from itself on a few rows."""
    values = {"max_steps": steps, "save_steps": STEPS, "per_device_train_batch_size": 4}
    config = load_config(
        ROOT / "configs" / "quickstart.yaml",
        {f"distill.{key}": value for key, value in values.items()} | {"distill.disable_tqdm": True},
    )
    rows = [[5 + i % 5, 13, 7, *range(20, 28), 1] for i in range(8)]
    trainer = DistillTrainer(
        model=model,
        args=distill_arguments(config, folder),
        train_dataset=Dataset.from_dict(
            {"input_ids": rows, "labels": [[-100] * 3 + row[3:] for row in rows]}
        ),
        processing_class=load_tokenizer("bundled"),
        teacher=SHAPE.model("cpu"),
        kl_weight=1.0,
        ce_weight=0.5,
    )
    sparsity = Sparsity(
        source=folder,
        schedule=None,
        rule=RefinementRule(
            scope="matrix", score="magnitude", movement_weight=0.5, protect_steps=0, min_density=0.0
        ),
        movement=MovementRule(half_life_steps=50.0, dtype=dtype),
        first_step=0,
        stage="distill",
    )
    trainer.add_sparsity(sparsity)
    return trainer, sparsity


def _timed_saving(trainer: DistillTrainer) -> dict[str, float]:
    """Trains to a checkpoint, then saves it again in turn without the engine's files and with."""
    trainer.train()
    seconds: dict[str, list[float]] = {"without_engine": [], "checkpoint": []}
    for _ in range(ROUNDS):
        for side, found in seconds.items():
            started = time.perf_counter()
            with nullcontext() if side == "checkpoint" else _without_engine():
                trainer._save_checkpoint(trainer.model, None)
            found.append(time.perf_counter() - started)
    medians = {side: statistics.median(found) for side, found in seconds.items()}
    return medians | {"added": medians["checkpoint"] / medians["without_engine"] - 1}


@contextmanager
def _without_engine() -> Iterator[None]:
    """What the trainer writes of masks, movement and where weights lie: nothing."""
    names = ("add_sparsity", "save_map")
    before = {name: getattr(sparse_trainer, name) for name in names}
    for name in names:
        setattr(sparse_trainer, name, lambda *_: None)
    try:
        yield
    finally:
        for name in names:
            setattr(sparse_trainer, name, before[name])


def _process(words: list[str]) -> float:
    """Seconds of a command of `launch/train.py`, the best of three."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        command = [sys.executable, "launch/train.py", *words]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
        found.append(time.perf_counter() - started)
    return min(found)


def show(result: dict) -> None:
    """Prints the figures beside their goals."""
    for dtype, found in result["movement"].items():
        resume = found["resume_seconds"]
        print(
            f"movement in {dtype}: masks and movement add {found['bytes']['added']:.1%} of the "
            f"bytes and {found['seconds']['added']:.1%} of the seconds (goal 10 %); resuming takes "
            f"{resume['resuming']:.1f} s, loading alone {resume['loading']:.1f} s (goal 5 s more)"
        )
    times = ", ".join(f"{name} {value:.1f} s" for name, value in result["process_seconds"].items())
    print(f"{times} (goal 3 s)")
