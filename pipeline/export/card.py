"""The model card of an export: what it is, what was measured, whom to cite.

Figures come from report.json alone; without a report the card says that nothing was measured. Left
out: the base model's licence and naming rule, which the user has to follow and knows.
"""

from collections.abc import Sequence

from pipeline.evaluation.markdown import escape, table
from pipeline.evaluation.summary import Report, key_facts, model_table

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
        "---\nlibrary_name: transformers\ntags: [pruned, sparse, arxiv:2505.14052]\n---",
        "# Sparse Llama",
        table(facts),
        "The base model's licence holds for this one too.",
        "## Figures",
        *figures,
        "## How to load it",
        "```python\n" + "\n".join(loading_lines) + "\n```",
        "## Citation",
        "Pruned by movement and magnitude (MAMA, arXiv 2505.14052):",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(sections) + "\n"
