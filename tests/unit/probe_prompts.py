"""Prompts that a tiny model answers partly right, and a run in which it can be asked."""

from datasets import Dataset
from trl import SFTConfig

from pipeline.rollouts import generate
from pipeline.training.distill_trainer import DistillTrainer
from pipeline.training.probe import ProbePrompt
from tests.unit.tiny_models import tiny
from tests.unit.unchecked import Unchecked

TEXTS = ["12@35=", "7@7=", "12@35#47=", "3#9=", "41@2#8=", "5@6=", "11#11="]
"""An odd number, of different lengths."""


def prompts_for(tokenizer, seed=0, max_new_tokens=4):
    """Every third has a wrong reference, every other one no completion."""
    encoded = [tokenizer(text)["input_ids"] for text in TEXTS]
    answers = tokenizer.batch_decode(
        generate(
            tiny(tokenizer, seed), tokenizer, encoded, max_new_tokens=max_new_tokens, batch_size=1
        ),
        skip_special_tokens=True,
    )
    return [
        ProbePrompt(
            ids,
            "wrong" if index % 3 == 0 else answer,
            [8 + index, *range(20, 20 + index), 1] if index % 2 == 0 else None,
        )
        for index, (ids, answer) in enumerate(zip(encoded, answers, strict=True))
    ]


def short_distillation(tokenizer, out, **arguments):
    """A trainer of three steps; the batch of each is four rows on each rank."""
    rows = [[5 + i, 13, 7, *range(20, 21 + i), 1] for i in range(8)]
    values = {
        "output_dir": str(out),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    args = SFTConfig(**(values | arguments))
    trainer = DistillTrainer(
        model=tiny(tokenizer, 0),
        args=args,
        train_dataset=Dataset.from_dict(
            {"input_ids": rows, "labels": [[-100] * 3 + row[3:] for row in rows]}
        ),
        processing_class=tokenizer,
        teacher=tiny(tokenizer, 1),
        kl_weight=1.0,
        ce_weight=0.5,
    )
    trainer.skipped_steps = trainer.sparsity = Unchecked()
    return trainer
