"""The same measurement for every model of a run: accuracy, perplexity, agreement with the teacher.

Accuracy: greedy, on held-out prompts. Perplexity and KL: on given completions of the same prompts,
by default the teacher's greedy ones, because a task's reference answer need not be what a model
should write. Where the config asks for it: sampled accuracy, a second perplexity on a text out of
the task's domain, and tasks of lm-evaluation-harness.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace

from transformers import PreTrainedModel

from pipeline.artifacts import RunFolder
from pipeline.config import Config
from pipeline.evaluation.accuracy import AccuracyResult, greedy_accuracy
from pipeline.evaluation.agreement import Agreement, agreement_with_teacher
from pipeline.evaluation.completions import TokenPair
from pipeline.evaluation.harness import TaskScore, zero_shot_scores
from pipeline.evaluation.perplexity import Perplexity, completion_perplexity
from pipeline.evaluation.report import Measurements
from pipeline.evaluation.sampled_accuracy import SampledAccuracy, sampled_accuracy
from pipeline.evaluation.text_perplexity import text_windows
from pipeline.models.prompts import encode_answer
from pipeline.stages.inputs import TaskInputs
from pipeline.stages.teacher_rollouts import cached_rollouts

COMPLETIONS = {
    "teacher": "the teacher's greedy completions of the held-out prompts",
    "answers": "the task's answers to the held-out prompts",
}
"""`evaluate.completions` in words."""


def text_in_words(config: Config) -> str | None:
    """The text of the second perplexity; None where there is none."""
    values = config.evaluate
    parts = (values.text_path, values.text_subset, values.text_split)
    return " ".join(filter(None, parts)) if values.text_path else None


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
    found = Measurements(
        accuracy=accuracy,
        sampled=_sampled(name, model, config, inputs),
        text_perplexity=_text_perplexity(name, model, config, inputs),
        zero_shot=None
        if inputs.harness is None
        else zero_shot_scores(
            model,
            inputs.tokenizer,
            inputs.harness,
            batch_size=config.evaluate.zero_shot_batch_size,
            seed=config.run.seed,
        ),
    )
    if pairs is None:
        return found
    batch_size = config.evaluate.batch_size
    if compare_with is not None:
        agreement = agreement_with_teacher(
            model, compare_with, pairs, batch_size=batch_size, progress=f"{name}: KL"
        )
        found = replace(found, agreement=agreement)
    perplexity = completion_perplexity(
        model, pairs, batch_size=batch_size, progress=f"{name}: perplexity"
    )
    return replace(found, perplexity=perplexity)


def _sampled(
    name: str, model: PreTrainedModel, config: Config, inputs: TaskInputs
) -> SampledAccuracy | None:
    """Accuracy of sampled answers; None where none are asked for."""
    values = config.evaluate
    if values.sampled_completions is None:
        return None
    return sampled_accuracy(
        model,
        inputs.tokenizer,
        inputs.task.test,
        inputs.encode,
        inputs.verifier,
        num_samples=values.sampled_completions,
        temperature=values.temperature,
        max_new_tokens=values.max_new_tokens,
        batch_size=values.batch_size,
        seed=config.run.seed,
        progress=f"{name}: sampled accuracy",
    )


def _text_perplexity(
    name: str, model: PreTrainedModel, config: Config, inputs: TaskInputs
) -> Perplexity | None:
    """Perplexity of `evaluate.text_path` in windows; None where it is not set."""
    if inputs.text_ids is None:
        return None
    values = config.evaluate
    seq_len, stride = values.text_seq_len, values.text_stride
    found = completion_perplexity(
        model,
        text_windows(inputs.text_ids, seq_len=seq_len, stride=stride),
        batch_size=max(1, values.batch_size * values.max_new_tokens // seq_len),
        progress=f"{name}: text perplexity",
    )
    return replace(found, stride=stride)


def comparable(found: Measurements, to: Measurements) -> Measurements:
    """Measurements without what was taken on another text, window, or number of samples or shots.

    A one-shot student is measured when it is pruned, the others at the end.
    """

    def same(kind: str, *what: str) -> bool:
        one, other = getattr(found, kind), getattr(to, kind)
        return (
            one is not None
            and other is not None
            and all(getattr(one, name) == getattr(other, name) for name in what)
        )

    taken_on = ("num_tokens", "seq_len", "stride")
    return replace(
        found,
        perplexity=found.perplexity if same("perplexity", *taken_on) else None,
        agreement=found.agreement if same("agreement", "num_tokens") else None,
        text_perplexity=found.text_perplexity if same("text_perplexity", *taken_on) else None,
        sampled=found.sampled if same("sampled", "num_samples", "temperature") else None,
        zero_shot=found.zero_shot and _same_examples(found.zero_shot, to.zero_shot or {}),
    )


def _same_examples(
    found: Mapping[str, TaskScore], to: Mapping[str, TaskScore]
) -> dict[str, TaskScore] | None:
    """The scores of tasks that no other number of examples was shown in."""
    same = {
        task: score
        for task, score in found.items()
        if task not in to or to[task].num_fewshot == score.num_fewshot
    }
    return same or None


def to_json(measurements: Measurements) -> dict:
    """Plain values; the inverse of `from_json`."""
    return asdict(measurements)


def from_json(values: dict) -> Measurements:
    """Measurements as `to_json` gave them."""
    kinds = {
        "accuracy": AccuracyResult,
        "perplexity": Perplexity,
        "agreement": Agreement,
        "text_perplexity": Perplexity,
        "sampled": SampledAccuracy,
    }
    found = {name: kind(**values[name]) for name, kind in kinds.items() if values.get(name)}
    if values.get("zero_shot"):
        found["zero_shot"] = {
            task: TaskScore(**score) for task, score in values["zero_shot"].items()
        }
    return Measurements(**found)
