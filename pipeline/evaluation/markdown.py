"""`report.md`: the numbers of `report.json`, with what only a reader needs beside them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.evaluation.figures import Picture
from pipeline.evaluation.formats import duration, percent
from pipeline.evaluation.more_tables import more_tables
from pipeline.evaluation.summary import (
    MODELS,
    NOT_MEASURED,
    Report,
    RunDescription,
    Sample,
    key_facts,
    model_table,
    try_it_lines,
)

MAX_SAMPLE_CHARACTERS = 600
MAX_CELL_CHARACTERS = 80
"""Longest sample text that stands in one table with all others."""
MARKS_NOTE = "✓ right, ✗ wrong, as the verifier sees it."
LINE_BREAK = re.compile(r"\r\n?|\n")
MARKDOWN_SYNTAX = re.compile(r"([\\`*_\[\]<>|~$&#])")
REFINEMENT_COLUMNS = (
    "stage",
    "step",
    "target",
    "pruned",
    "regrown",
    "survived",
    "accepted",
    "reward_before",
    "reward_after",
    "score",
    "waited",
)


def render_markdown(report: Report, description: RunDescription) -> str:
    """The text of `report.md`: GitHub's Markdown, pictures by relative path."""
    asked = [[key, escape(text)] for key, text in description.asked.items()]
    sections = [
        f"# Run {escape(description.name)}",
        " ".join([*_ended(description), *key_facts(report)]),
        "## What was asked",
        table([["what", "asked for"], *asked]),
        *_settings(description.settings),
        "## What came out",
        *_came_out(report),
        *(f"[{escape(title)}]({path})" for title, path in description.other_pages.items()),
        *(picture_link(path, picture) for path, picture in description.pictures.items()),
        *_more_tables(report),
        *_refinement(report.get("refinement")),
        *_samples(description.samples),
        *_cost(report),
        "## How to run it again",
        code_block(description.command, "sh"),
        table([["what", "value"], *_provenance(report)]),
        *_try_it(description),
    ]
    return "\n\n".join(sections) + "\n"


def _ended(description: RunDescription) -> list[str]:
    return [] if description.ended is None else [f"**{escape(description.ended)}**"]


def _settings(settings: Mapping[str, Any]) -> list[str]:
    """The keys that make this run what it is, folded."""
    if not settings:
        return []
    rows = [[f"`{key}`", escape(str(value))] for key, value in settings.items()]
    summary = f"<details><summary>{len(rows)} keys that are not the default</summary>"
    return [summary, table([["key", "value"], *rows]), "</details>"]


def _came_out(report: Report) -> list[str]:
    """The table of models and what its columns are."""
    rows = model_table(report)
    if len(rows) == 1:
        return ["No model of this run was measured."]
    return [table(rows), "\n".join(f"- {note}" for note in _notes(report))]


def _try_it(description: RunDescription) -> list[str]:
    if description.student_path is None:
        return []
    return [
        "## How to try the model",
        f"It is in {escape(description.student_path)}.",
        code_block("\n".join(try_it_lines(description)), "python"),
    ]


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table of text cells; the first row is its header."""
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([header, "|" + " --- |" * len(rows[0]), *body])


def escape(text: str) -> str:
    """Text that shows as it is, also inside a table cell."""
    return LINE_BREAK.sub("<br>", MARKDOWN_SYNTAX.sub(r"\\\1", text))


def code_block(text: str, language: str = "") -> str:
    """Lines of code, in a fence that nothing in them closes."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def picture_link(path: str, picture: Picture) -> str:
    """A picture by its path relative to the page, its title for those who cannot see it."""
    return f"![{escape(picture.title)}]({path})"


def _notes(report: Report) -> list[str]:
    """What each column of the table of models is."""
    notes = []
    if "accuracy" in report:
        notes.append(
            f"Accuracy: greedy answers to {report['accuracy']['num_prompts']:,} held-out prompts, "
            "the same for all models; Wilson interval."
        )
    if "perplexity" in report:
        perplexity = report["perplexity"]
        notes.append(
            f"Perplexity: per token of {perplexity.get('on', 'the reference completions')}; "
            f"{perplexity['num_tokens']:,} tokens, longest sequence {perplexity['seq_len']:,}."
        )
    if "kl_to_teacher" in report:
        notes.append(
            "KL(teacher || model): nats per token of the same text. Top-1 as teacher: share of "
            "those tokens where both rank the same one first."
        )
    if "text_perplexity" in report:
        text = report["text_perplexity"]
        apart = f", {text['stride']:,} apart" if "stride" in text else ""
        notes.append(
            f"Text perplexity: per token of {escape(text['on'])}; {text['num_tokens']:,} tokens in "
            f"windows of {text['seq_len']:,}{apart}."
        )
    per_layer = report.get("sparsity", {}).get("per_layer", {}).values()
    if per_layer:
        notes.append(
            f"Sparsity of single matrices: {percent(min(per_layer))} to {percent(max(per_layer))}."
        )
    return notes


def _more_tables(report: Report) -> list[str]:
    return [
        text
        for more in more_tables(report)
        for text in (
            f"## {more.title}",
            escape(more.note),
            table([[escape(cell) for cell in row] for row in more.rows]),
        )
    ]


def _refinement(entries: Sequence[dict[str, Any]] | None) -> list[str]:
    if not entries:
        return []
    columns = [name for name in REFINEMENT_COLUMNS if any(name in entry for entry in entries)]
    rows = [[_cell(entry.get(name)) for name in columns] for entry in entries]
    header = [name.replace("_", " ") for name in columns]
    summary = f"<details><summary>{len(entries)} refinements of the mask</summary>"
    note = "In weights; survived: of all that ever regrew, those kept after the step."
    if any("reward_before" in entry for entry in entries):
        note += (
            " Rewards: of the mask before and of the one bound or, where none was accepted, of the "
            "best one refused; waited: steps by which the targets are late."
        )
    return ["## Refinement", note, summary, table([header, *rows]), "</details>"]


def _cell(value: Any) -> str:
    if value is None:
        return NOT_MEASURED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else escape(str(value))


def _samples(samples: Sequence[Sample]) -> list[str]:
    """Prompts down and models across; long answers get tables for each prompt."""
    if not samples:
        return []
    names = [name for name in MODELS if any(name in sample.completions for sample in samples)]
    texts = [text for s in samples for text in (s.prompt, *s.completions.values())]
    if max(map(len, texts)) > MAX_CELL_CHARACTERS:
        parts = [part for sample in samples for part in _sample(sample, names)]
        return ["## Sample answers", MARKS_NOTE, *parts]
    rows = [
        [_short(sample.prompt), _short(sample.answer), *(_answer(sample, name) for name in names)]
        for sample in samples
    ]
    return ["## Sample answers", MARKS_NOTE, table([["prompt", "reference", *names], *rows])]


def _sample(sample: Sample, names: Sequence[str]) -> list[str]:
    """The first model and the last, teacher and student, side by side; the others folded."""
    shown, others = list(dict.fromkeys([names[0], names[-1]])), names[1:-1]
    parts = [
        f"> **Prompt.** {_short(sample.prompt)}\n>\n> **Reference.** {_short(sample.answer)}",
        table([shown, [_answer(sample, name) for name in shown]]),
    ]
    if not others:
        return parts
    rows = [[name, _answer(sample, name)] for name in others]
    summary = f"<details><summary>{', '.join(others)}</summary>"
    return [*parts, summary, table([["model", "answer"], *rows]), "</details>"]


def _answer(sample: Sample, name: str) -> str:
    if name not in sample.completions:
        return NOT_MEASURED
    mark = "✓" if sample.correct[name] else "✗"
    return f"{mark} {_short(sample.completions[name]) or '*nothing*'}"


def _short(text: str) -> str:
    is_long = len(text) > MAX_SAMPLE_CHARACTERS
    return escape(text[:MAX_SAMPLE_CHARACTERS] + (" ..." if is_long else ""))


def _cost(report: Report) -> list[str]:
    timing, cost = report.get("timing", {}), report.get("cost", {})
    if not timing:
        return []
    rows = [[stage, duration(timing[stage]), *_spent(cost.get(stage, {}))] for stage in timing]
    hours = sum(spent["device_hours"] for spent in cost.values())
    tokens = sum(spent.get("tokens", 0) for spent in cost.values())
    total = [duration(sum(timing.values())), "", _hours(hours) if cost else NOT_MEASURED]
    rows.append(["all stages", *total, f"{tokens:,}" if tokens else NOT_MEASURED])
    header = ["stage", "time", "on", "device hours", "tokens trained on"]
    notes = [
        "Device hours: time x devices, a process counting as one device where there is no "
        "accelerator. Tokens: prompts and completions, over all ranks."
    ]
    if "peak_memory_bytes" in report:
        peak = report["peak_memory_bytes"] / 2**30
        notes.append(f"Peak memory of a process on the host: {peak:.2f} GiB.")
    return ["## What it cost", table([header, *rows]), "\n".join(f"- {note}" for note in notes)]


def _spent(cost: Mapping[str, Any]) -> list[str]:
    """Devices, their hours and tokens of one stage."""
    if not cost:
        return [NOT_MEASURED] * 3
    tokens = f"{cost['tokens']:,}" if "tokens" in cost else NOT_MEASURED
    return [f"{cost['processes']} x {cost['device']}", _hours(cost["device_hours"]), tokens]


def _hours(hours: float) -> str:
    return f"{hours:.3f}" if hours < 10 else f"{hours:,.1f}"


def _provenance(report: Report) -> list[list[str]]:
    keys = {"seed": "seed", "git_commit": "git commit", "config_hash": "config hash"}
    rows = [[name, f"`{report[key]}`"] for key, name in keys.items() if key in report]
    return rows + [[package, version] for package, version in report.get("versions", {}).items()]
