"""The model card of an export: what it is, what was measured, its licence, whom to cite.

Figures come from report.json alone; without a report the card says that nothing was measured.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.artifacts import write_text
from pipeline.evaluation.markdown import escape, table
from pipeline.evaluation.summary import Report, key_facts, model_table
from pipeline.export.licence import Licence

CITATION = """@misc{jiang2025mama,
  title = {Improved Methods for Model Pruning and Knowledge Distillation},
  author = {Wei Jiang and Anying Fu and Youling Zhang},
  year = {2025},
  eprint = {2505.14052},
  archivePrefix = {arXiv}
}"""


def model_card(
    report: Report | None,
    *,
    base_model: str,
    teacher: str,
    licences: Sequence[Licence],
    made_by: str,
    dtype: str,
    measured_dtype: str,
    loading_lines: Sequence[str],
) -> str:
    """The text of README.md, in GitHub's Markdown.

    Args:
        report: Of this student; None where it was not measured.
        base_model: `student.path`.
        teacher: `teacher.path`.
        licences: Of the base model and of the teacher.
        made_by: How it was pruned and trained, in words.
        dtype: Of the exported weights.
        measured_dtype: Of the weights when the report was made.
        loading_lines: Python that loads the folder `path`.
    """
    figures = (
        ["This model was not measured: the stage evaluate did not run on it."]
        if report is None
        else [
            " ".join(key_facts(report)),
            f"Measured before the export, on weights in {measured_dtype}.",
            table(model_table(report)),
        ]
    )
    facts = [
        ["what", "value"],
        ["base model", escape(base_model)],
        ["teacher", escape(teacher)],
        ["made by", escape(made_by)],
        ["type of the weights", dtype],
    ]
    sections = [
        _head(base_model, licences[0], loading_lines),
        f"# {escape(model_name(base_model, licences))}",
        *dict.fromkeys(f"**{found.attribution}**" for found in licences if found.attribution),
        table(facts),
        "## Licence",
        *_licence(base_model, teacher, licences),
        "## Figures",
        *figures,
        "## How to load it",
        "```python\n" + "\n".join(loading_lines) + "\n```",
        "## Citation",
        "Pruned by movement and magnitude (MAMA, arXiv 2505.14052):",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"


def model_name(base_model: str, licences: Sequence[Licence]) -> str:
    """A name that says where the model comes from and begins as the licences ask."""
    name = f"{Path(base_model).name}-sparse"
    prefix = max(("Llama", *(licence.name_prefix for licence in licences)), key=len)
    return name if name.startswith(prefix) else f"{prefix}-{name}"


def write_notices(folder: Path, licences: Sequence[Licence]) -> None:
    """Puts the base model's licence files, and the notices that licences ask for, into an export.

    Args:
        folder: Of the export.
        licences: Of the base model, whose files are copied, and of the teacher.
    """
    for file in licences[0].files:
        write_text(folder / file.name, file.read_text(errors="replace"))
    old = (folder / "NOTICE").read_text() if (folder / "NOTICE").exists() else ""
    notices = dict.fromkeys(licence.notice for licence in licences if licence.notice)
    missing = [notice for notice in notices if notice not in old]
    if missing:
        write_text(folder / "NOTICE", "\n".join([*filter(None, [old.rstrip()]), *missing]) + "\n")


def _head(base_model: str, licence: Licence, loading_lines: Sequence[str]) -> str:
    """The YAML that the Hub reads; of a library it makes a line that loads the model."""
    lines = ["tags: [pruned, sparse, arxiv:2505.14052]"]
    if loading_lines[0].startswith("from transformers "):
        lines.append("library_name: transformers")
    if licence.name and re.fullmatch(r"[\w.-]+", licence.name):
        lines.append(f"license: {licence.name}")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not Path(base_model).exists():
        lines.append(f"base_model: {base_model}")
    return "\n".join(["---", *lines, "---"])


def _licence(base_model: str, teacher: str, licences: Sequence[Licence]) -> list[str]:
    """Sentences on the licences of the weights and of the teacher's answers."""
    of_base, of_teacher = licences
    told = (
        f"The base model's licence, {of_base.name}, holds for this model too."
        if of_base.name
        else "No file beside the base model names its licence, which holds for this model too: "
        f"look where {escape(base_model)} came from before you pass it on."
    )
    sentences = [told]
    if of_teacher != of_base:
        name = of_teacher.name or "a licence that no file beside it names"
        sentences.append(f"Its teacher, {escape(teacher)}, is under {name}.")
    sentences += dict.fromkeys(found.notice for found in licences if found.notice)
    return sentences
