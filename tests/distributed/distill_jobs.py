"""One distillation step of a real trainer, inside a rank."""

from datasets import Dataset
from trl import SFTConfig

from pipeline.models.loading import load_tokenizer
from pipeline.training.distill_trainer import DistillTrainer
from tests.unit.tiny_models import tiny
from tests.unit.unchecked import Unchecked

NUM_ROWS = 8


def first_step(rank, world_size, folder):
    """What the trainer logs of a step on `NUM_ROWS` rows of different lengths, over all ranks."""
    tokenizer = load_tokenizer("bundled")
    rows = [[5 + i, 13, 7, *range(20, 21 + i), 1] for i in range(NUM_ROWS)]
    trainer = DistillTrainer(
        model=tiny(tokenizer, 0),
        args=SFTConfig(
            output_dir=folder,
            max_steps=1,
            per_device_train_batch_size=NUM_ROWS // world_size,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict(
            {"input_ids": rows, "labels": [[-100] * 3 + row[3:] for row in rows]}
        ),
        processing_class=tokenizer,
        teacher=tiny(tokenizer, 1),
        kl_weight=1.0,
        ce_weight=0.5,
    )
    trainer.skipped_steps = Unchecked()
    trainer.sparsity = Unchecked()
    trainer.train()
    assert trainer.accelerator.num_processes == world_size
    return {key: trainer.state.log_history[0][key] for key in ("loss", "grad_norm", "kl")}
