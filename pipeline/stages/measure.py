"""The same measurement for every model of a run: accuracy, perplexity, agreement with the teacher.

Accuracy: greedy, on held-out prompts. Perplexity and KL: on given completions of the same prompts,
by default the teacher's greedy ones, because a task's reference answer need not be what a model
should write. A second perplexity, on a text file, looks beyond the task where one is given.
"""

from dataclasses import asdict, replace

from transformers import PreTrainedModel

from pipeline.artifacts import RunFolder
from pipeline.config import Config
from pipeline.data.text import read_text
from pipeline.evaluation.accuracy import AccuracyResult, greedy_accuracy
from pipeline.evaluation.agreement import Agreement, agreement_with_teacher
from pipeline.evaluation.completions import TokenPair
from pipeline.evaluation.perplexity import Perplexity, completion_perplexity
from pipeline.evaluation.report import Measurements
from pipeline.evaluation.text_perplexity import text_windows
from pipeline.models.prompts import encode_answer
from pipeline.stages.inputs import TaskInputs
from pipeline.stages.teacher_rollouts import cached_rollouts

COMPLETIONS = {
    "teacher": "the teacher's greedy completions of the held-out prompts",
    "answers": "the task's answers to the held-out prompts",
}
"""`evaluate.completions` in words."""


def reference_completions(
    folder: RunFolder, config: Config, teacher: PreTrainedModel, inputs: TaskInputs
) -> list[TokenPair]:
    """Token ids of the held-out prompts and of the completions that all models are scored on.

    The teacher's are made once per run.
    """
    rows = inputs.task.test
    if config.evaluate.completions == "answers":
        return [
            (inputs.encode(row.prompt), encode_answer(inputs.tokenizer, row.answer)) for row in rows
        ]
    rollouts = cached_rollouts(
        folder,
        "test",
        config,
        teacher,
        inputs,
        rows,
        num_rollouts=len(rows),
        temperature=0.0,
        max_new_tokens=config.evaluate.max_new_tokens,
        progress="teacher answers",
    )
    return [(rollout.prompt_ids, rollout.completion_ids) for rollout in rollouts]


def measure(
    name: str,
    model: PreTrainedModel,
    config: Config,
    inputs: TaskInputs,
    compare_with: PreTrainedModel | None,
    pairs: list[TokenPair] | None,
) -> Measurements:
    """Measures one model.

    Args:
        name: Shown on the progress bars.
        model: In evaluation mode.
        config: Batch size and lengths.
        inputs: The task.
        compare_with: What agreement is measured with, the teacher or the dense student; None
            leaves that out.
        pairs: From `reference_completions`; None leaves out what needs them.
    """
    accuracy = greedy_accuracy(
        model,
        inputs.tokenizer,
        inputs.task.test,
        inputs.encode,
        inputs.verifier,
        max_new_tokens=config.evaluate.max_new_tokens,
        batch_size=config.evaluate.batch_size,
        progress=f"{name}: accuracy",
    )
    batch_size = config.evaluate.batch_size
    found = Measurements(
        accuracy=accuracy, text_perplexity=_text_perplexity(name, model, config, inputs)
    )
    if pairs is None:
        return found
    if compare_with is not None:
        agreement = agreement_with_teacher(
            model, compare_with, pairs, batch_size=batch_size, progress=f"{name}: KL"
        )
        found = replace(found, agreement=agreement)
    perplexity = completion_perplexity(
        model, pairs, batch_size=batch_size, progress=f"{name}: perplexity"
    )
    return replace(found, perplexity=perplexity)


def text_tokens(config: Config, inputs: TaskInputs) -> list[int]:
    """The tokens of `evaluate.text_path`."""
    text = read_text(config.evaluate.text_path, "evaluate.text_path")
    return inputs.tokenizer(text, verbose=False)["input_ids"]


def _text_perplexity(
    name: str, model: PreTrainedModel, config: Config, inputs: TaskInputs
) -> Perplexity | None:
    """Perplexity of `evaluate.text_path` in windows; None where it is not set."""
    values = config.evaluate
    if values.text_path is None:
        return None
    windows = text_windows(
        text_tokens(config, inputs), seq_len=values.text_seq_len, stride=values.text_stride
    )
    batch_size = max(1, values.batch_size * values.max_new_tokens // values.text_seq_len)
    return completion_perplexity(
        model, windows, batch_size=batch_size, progress=f"{name}: text perplexity"
    )


def to_json(measurements: Measurements) -> dict:
    """Plain values; the inverse of `from_json`."""
    return asdict(measurements)


def from_json(values: dict) -> Measurements:
    """Measurements as `to_json` gave them."""
    return Measurements(
        accuracy=AccuracyResult(**values["accuracy"]) if values["accuracy"] else None,
        perplexity=Perplexity(**values["perplexity"]) if values["perplexity"] else None,
        agreement=Agreement(**values["agreement"]) if values["agreement"] else None,
        text_perplexity=Perplexity(**values["text_perplexity"])
        if values["text_perplexity"]
        else None,
    )
