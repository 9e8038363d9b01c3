"""The short form of a report: one table of models, a few sentences, three lines to try the student.

The terminal shows exactly this when a run ends; `markdown.py` shows it among more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipeline.evaluation.figures import Picture
from pipeline.evaluation.formats import number, percent, percent_within, perplexity_text
from pipeline.models.prompts import Prompt

MODELS = ("teacher", "dense", "pruned", "distilled", "on_policy", "student")
"""The models of a report, in the order of the pipeline."""

Report = dict[str, Any]
"""The content of `report.json`, schema 1."""

NOT_MEASURED, NOT_FINITE = "-", "not finite"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One held-out prompt and the answers to it."""

    prompt: str
    answer: str
    """The reference."""
    completions: Mapping[str, str]
    """Model name to what it wrote."""
    correct: Mapping[str, bool]
    """Model name to what the verifier said; the same names."""


@dataclass(frozen=True, kw_only=True)
class RunDescription:
    """What readers need beside the numbers."""

    name: str
    """Of the run folder."""
    asked: Mapping[str, str]
    """What was asked for, in words: `Teacher` to its path, `Task` to its name, and so on."""
    command: str
    """The command that makes this run again."""
    student_path: str | None
    """Where the final model, or the last one so far, can be loaded from."""
    example_prompt: Prompt
    """A prompt to try it with, formatted as in training."""
    max_new_tokens: int
    """Longest answer to it, in tokens."""
    pictures: Mapping[str, Picture] = field(default_factory=dict)
    """By path relative to the run folder."""
    samples: Sequence[Sample] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys that are not the default, to their values."""
    ended: str | None = None
    """How a run stands that was not evaluated."""
    other_pages: Mapping[str, str] = field(default_factory=dict)
    """Title to path relative to the run folder."""


def model_table(report: Report) -> list[list[str]]:
    """Header and one row of text for each model of which anything was measured."""
    perplexity_cell = partial(_number_cell, show=perplexity_text)
    columns = {
        "accuracy [95 % interval]": ("accuracy", _accuracy_cell),
        "perplexity": ("perplexity", perplexity_cell),
        "KL to teacher": ("kl_to_teacher", _number_cell),
        "top-1 as teacher": ("top1_with_teacher", _percent_cell),
    }
    if "text_perplexity" in report:
        columns["text perplexity"] = ("text_perplexity", perplexity_cell)
    parts = [report.get(key, {}) for key, _ in columns.values()]
    rows = [
        [name, *(cell(report.get(key, {}), name) for key, cell in columns.values())]
        for name in MODELS
        if any(name in part for part in parts)
    ]
    return [["model", *columns], *rows]


def _accuracy_cell(accuracy: Mapping[str, Any], name: str) -> str:
    if name not in accuracy:
        return NOT_MEASURED
    return percent_within(accuracy[name], accuracy["ci95"][name])


def _number_cell(
    values: Mapping[str, float | None], name: str, show: Callable[[float], str] = number
) -> str:
    if name not in values:
        return NOT_MEASURED
    return NOT_FINITE if values[name] is None else show(values[name])


def _percent_cell(values: Mapping[str, float], name: str) -> str:
    return percent(values[name]) if name in values else NOT_MEASURED


def key_facts(report: Report) -> list[str]:
    """Sparsity, the student's accuracy beside the dense model's, and which students were kept."""
    facts = _sparsity_facts(**report.get("sparsity", {}))
    accuracy = report.get("accuracy", {})
    if "student_over_dense" in accuracy:
        ratio, difference = accuracy["student_over_dense"], accuracy["student_minus_dense"]
        low, high = ratio["ci95"]
        low_points, high_points = (100 * bound for bound in difference["ci95"])
        facts.append(
            f"Student / dense accuracy {ratio['value']:.3f} [{low:.3f}, {high:.3f}], difference "
            f"{100 * difference['value']:+.1f} points [{low_points:+.1f}, {high_points:+.1f}], on "
            f"the same {accuracy['num_prompts']:,} prompts."
        )
    for stage, found in report.get("heldout", {}).items():
        facts.append(
            f"Stage {stage} left its student of step {found['step']:,} of {found['steps']:,}, "
            f"right on {percent(found['accuracy'])} of the prompts set aside for choosing it."
        )
    for change in report.get("topology_changes", []):
        before, after = (
            f"{layout['engine']} on {layout['world_size']}"
            for layout in (change["before"], change["after"])
        )
        facts.append(
            f"From step {change['step']:,} on, stage {change['stage']} went on under another "
            f"layout: {before}, then {after} ranks."
        )
    return facts


def _sparsity_facts(
    measured: float | None = None, target: float | None = None, **_: Any
) -> list[str]:
    if measured is None:
        return [] if target is None else [f"Sparsity {target:g} was asked for."]
    fact = f"Sparsity {measured:.4f}, counted in the saved weights"
    return [f"{fact}." if target is None else f"{fact}; asked for {target:g}."]


def try_it_lines(description: RunDescription) -> list[str]:
    """Three lines of Python that load the model and let it answer the example prompt."""
    path, prompt = description.student_path, description.example_prompt
    if isinstance(prompt, str):
        encoded = f'tokenizer({prompt!r}, return_tensors="pt").input_ids'
    else:
        encoded = (
            f"tokenizer.apply_chat_template({prompt!r}, add_generation_prompt=True, "
            'return_dict=True, return_tensors="pt").input_ids'
        )
    load = f"from_pretrained({path!r})"
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model, tokenizer = AutoModelForCausalLM.{load}, AutoTokenizer.{load}",
        f"print(tokenizer.decode(model.generate({encoded}, "
        f"max_new_tokens={description.max_new_tokens}, do_sample=False)[0]))",
    ]


def terminal_summary(report: Report, description: RunDescription) -> str:
    """What the terminal shows at the end of a run."""
    python = [f"    {line}" for line in try_it_lines(description)]
    where = f"The model is in {description.student_path}. To try it:"
    return "\n".join(
        [*text_table(model_table(report)), "", *key_facts(report), "", where, "", *python]
    )


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the cells of each column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
