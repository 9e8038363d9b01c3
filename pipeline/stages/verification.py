"""What candidate masks are judged by: the probe prompts, the teacher's completions, the rewards."""

import logging

from transformers import PreTrainedModel

from pipeline.artifacts import RunFolder
from pipeline.config import Config
from pipeline.ranks import on_main
from pipeline.rollouts import Rollout
from pipeline.stages.inputs import TaskInputs, open_teacher
from pipeline.stages.teacher_rollouts import cached_rollouts
from pipeline.training.mask_choice import MaskReward
from pipeline.training.probe import ProbePrompt
from pipeline.training.verified_refinement import Verification

logger = logging.getLogger(__name__)


def open_verification(
    config: Config,
    folder: RunFolder,
    stage: str,
    inputs: TaskInputs,
    teacher: PreTrainedModel | None,
) -> Verification | None:
    """Samples the teacher's completions once, and gathers what a stage needs to judge masks.

    To be called before the stage's training arguments exist: under ZeRO-3 models load in pieces
    then. Every rank calls it.

    Args:
        config: The run's.
        folder: Keeps the completions.
        stage: `distill`, `on_policy` or `grpo`.
        inputs: The task.
        teacher: Where it is open already; None opens it on rank 0 if it must be asked.

    Returns:
        None where the stage verifies nothing.
    """
    if not (config.refine.verify and config.moves_mask and stage in config.refine.stages):
        return None
    num_right = on_main(lambda: len(_probe_rollouts(config, folder, inputs, teacher)))
    completions = {
        rollout.prompt: rollout.completion_ids
        for rollout in _probe_rollouts(config, folder, inputs, teacher)
    }
    rows = inputs.task.probe
    logger.info("%s: masks are judged on %d probe prompts", stage, len(rows))
    if num_right < len(rows) / 2:
        logger.warning(
            "%s: refine.verify: the teacher's greedy answer is right on %d of %d probe prompts, "
            "and masks are ranked on those alone; set a longer evaluate.max_new_tokens if its "
            "answers are cut",
            stage,
            num_right,
            len(rows),
        )
    return Verification(
        prompts=[
            ProbePrompt(inputs.encode(row.prompt), row.answer, completions.get(row.prompt))
            for row in rows
        ],
        verifier=inputs.verifier,
        reward=mask_reward(config),
        max_new_tokens=config.evaluate.max_new_tokens,
        batch_size=config.evaluate.batch_size,
    )


def mask_reward(config: Config) -> MaskReward:
    """The weights of the section `rewards`, as they concern a mask."""
    rewards = config.rewards
    weights = rewards.weights or [1.0] * len(rewards.functions)
    of_function = dict(zip(rewards.functions, weights, strict=True))
    return MaskReward(
        correctness_weight=of_function.get("correctness", 1.0),
        sparsity_weight=rewards.sparsity_weight,
        teacher_kl_weight=rewards.teacher_kl_weight,
        tolerance=config.refine.tolerance,
    )


def _probe_rollouts(
    config: Config, folder: RunFolder, inputs: TaskInputs, teacher: PreTrainedModel | None
) -> list[Rollout]:
    """The teacher's greedy completions of the probe prompts, where they are right."""
    rows = inputs.task.probe
    return cached_rollouts(
        folder,
        "probe",
        config,
        (lambda: open_teacher(config)) if teacher is None else teacher,
        inputs,
        rows,
        num_rollouts=len(rows),
        temperature=0.0,
        max_new_tokens=config.evaluate.max_new_tokens,
        progress="teacher answers to probe prompts",
        verified=True,
    )
