"""Calibration rows of a run, from the config's source to batches.

rollouts: the calibration prompts with the teacher's own verified completions. Models that reason
    are pruned far better on their own chains of thought than on other text (RAC, arXiv 2509.12464).
    Sampled once, kept in `rollouts/calibration.jsonl`.
answers: the prompts with the task's answers.
prompts: the prompts alone.
text: pieces of a text file.

Without a completion every token but the first is scored by the loss behind calibration movement.
"""

import logging

from transformers import PreTrainedModel

from pipeline.artifacts import RunFolder
from pipeline.config import Config
from pipeline.data.text import read_text, text_chunks
from pipeline.errors import UserError
from pipeline.models.prompts import encode_answer
from pipeline.pruning.batches import CalibrationBatch, calibration_batches
from pipeline.stages.inputs import TaskInputs
from pipeline.stages.teacher_rollouts import cached_rollouts

logger = logging.getLogger(__name__)

Rows = list[tuple[list[int], list[int]]]
"""Token ids of prompt and completion."""


def calibration_set(
    config: Config, folder: RunFolder, inputs: TaskInputs, teacher: PreTrainedModel
) -> list[CalibrationBatch]:
    """The calibration batches.

    Raises:
        UserError: The teacher has no right completion, or the text cannot be read.
    """
    source = config.calibration.source
    if source == "rollouts":
        rows = _rollouts(config, folder, inputs, teacher)
    elif source == "text":
        rows = _text(config, inputs)
    else:
        rows = [(inputs.encode(row.prompt), row.answer) for row in inputs.task.calibration]
        if source == "answers":
            rows = [(prompt, encode_answer(inputs.tokenizer, answer)) for prompt, answer in rows]
        else:
            rows = [(prompt[:1], prompt[1:]) for prompt, _ in rows]
    prompts, completions = zip(*rows, strict=True)
    return calibration_batches(
        prompts,
        completions,
        pad_token_id=inputs.tokenizer.pad_token_id,
        batch_size=config.calibration.batch_size,
    )


def _rollouts(
    config: Config, folder: RunFolder, inputs: TaskInputs, teacher: PreTrainedModel
) -> Rows:
    wanted = inputs.task.calibration
    rollouts = cached_rollouts(
        folder,
        "calibration",
        config,
        teacher,
        inputs,
        wanted,
        num_rollouts=len(wanted),
        temperature=config.calibration.temperature,
        max_new_tokens=config.evaluate.max_new_tokens,
        progress="calibration completions",
        verified=True,
    )
    if not rollouts:
        raise UserError(
            f"calibration.source: rollouts: the teacher got none of {len(wanted)} calibration "
            "prompts right; set answers, a larger evaluate.max_new_tokens, or another teacher"
        )
    if len(rollouts) < len(wanted):
        logger.info(
            "calibration: the teacher got %d of %d prompts right; only those are used",
            len(rollouts),
            len(wanted),
        )
    return [(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts]


def _text(config: Config, inputs: TaskInputs) -> Rows:
    values = config.calibration
    text = read_text(values.text_path, "calibration.text_path")
    chunks = text_chunks(
        inputs.tokenizer(text, verbose=False)["input_ids"],
        seq_len=values.seq_len,
        num_chunks=config.task.num_calibration,
        seed=config.run.seed,
    )
    return [(chunk[:1], chunk[1:]) for chunk in chunks]
