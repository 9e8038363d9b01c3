"""Stage 3, where it is asked for: the student learns from the teacher on its own completions.

Between `distill`, whose completions a recovered student may never write, and `grpo`, which needs no
more than answers that are sometimes right. No rewards: the teacher judges every token.
"""

from pathlib import Path

from datasets import Dataset

from pipeline.artifacts import RunFolder
from pipeline.config import Config
from pipeline.stages.inputs import TaskInputs, open_student, open_teacher
from pipeline.stages.training import Training, stage_sparsity, train
from pipeline.stages.verification import open_verification
from pipeline.training.arguments import on_policy_arguments
from pipeline.training.on_policy_trainer import OnPolicyTrainer


def run(
    config: Config, folder: RunFolder, inputs: TaskInputs, out: Path, checkpoint: Path | None = None
) -> Training:
    """Distils with the mask on; completions are sampled anew at each step."""
    teacher = open_teacher(config)
    verification = open_verification(config, folder, "on_policy", inputs, teacher)
    arguments = on_policy_arguments(config, out)
    model, source = open_student(config, folder, "on_policy")
    trainer = OnPolicyTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_dict(
            {"prompt": [inputs.format(row.prompt) for row in inputs.task.train]}
        ),
        processing_class=inputs.tokenizer,
        teacher=teacher,
        teacher_placement=config.teacher.placement,
    )
    sparsity = stage_sparsity(config, folder, "on_policy", source, verification)
    return train(config, inputs, trainer, sparsity, out, checkpoint)
