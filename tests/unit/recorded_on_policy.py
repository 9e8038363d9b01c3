"""An on-policy trainer of a tiny student, with sampled or recorded completions."""

from datasets import Dataset
from trl import DistillationConfig

from pipeline.training.on_policy_trainer import OnPolicyTrainer
from tests.unit.tiny_models import tiny

END = 1
COMPLETIONS = {  # of different lengths; the last one is cut off
    "12@35=": [11, 12, END],
    "12@35#47=": [9, 40, END],
    "3@5=": [END],
    "3@5#1=": [8, 8, 41, 17],
}
PROMPTS = list(COMPLETIONS)


class RecordedTrainer(OnPolicyTrainer):
    """Answers each prompt with its recorded completion; all that follows is the real thing."""

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        known = {tuple(self.processing_class(p)["input_ids"]): c for p, c in COMPLETIONS.items()}
        return [known[tuple(ids)] for ids in prompt_ids]


def on_policy_trainer(
    tokenizer, folder, *, trainer_class=OnPolicyTrainer, model=None, options=None, **arguments
):
    """A trainer in training mode.

    `options` are those of `OnPolicyTrainer`, `arguments` those of `DistillationConfig`.
    """
    values = {
        "per_device_train_batch_size": 4,
        "max_completion_length": 4,
        "max_steps": 1,
        "shuffle_dataset": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    trainer = trainer_class(
        model=tiny(tokenizer, 0) if model is None else model,
        args=DistillationConfig(output_dir=str(folder), **(values | arguments)),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 8}),
        processing_class=tokenizer,
        **({"teacher": tiny(tokenizer, 1)} | (options or {})),
    )
    trainer.model.train()
    return trainer
