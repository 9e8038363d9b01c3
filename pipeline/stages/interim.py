"""The page of a run without evaluation: it failed, was stopped, or was not to have one.

It has what the finished stages left, and says how the run ended and how it goes on. `report.json`
is not written: that is a whole report's.
"""

import json
import logging

from pipeline.artifacts import STAGES, RunFolder
from pipeline.config import Config
from pipeline.evaluation.markdown import render_markdown
from pipeline.evaluation.page import write_page
from pipeline.evaluation.report import build_report
from pipeline.evaluation.summary import RunDescription
from pipeline.stages.drawing import draw
from pipeline.stages.inputs import TaskInputs, stage_before
from pipeline.stages.measure import COMPLETIONS, from_json, text_in_words
from pipeline.stages.run_facts import asked, command, facts, settings
from pipeline.stopping import Stopped, held

logger = logging.getLogger(__name__)


def write_interim(
    config: Config, folder: RunFolder, inputs: TaskInputs, error: BaseException | None
) -> None:
    """Writes `report.md` and `report.html`, unless the run has been evaluated. Rank 0 alone.

    A page that cannot be written is a line in the log, never a second failure.

    Args:
        config: Of the run.
        folder: Its stages.
        inputs: The task.
        error: What ended the run; None where it did what it was asked.
    """
    if folder.is_done("evaluate") or not any(map(folder.record, STAGES)):
        return
    try:
        with held():
            _write(config, folder, inputs, error)
    except Exception as trouble:
        logger.warning("%s: no report.html: %s", folder.root, trouble)


def _write(
    config: Config, folder: RunFolder, inputs: TaskInputs, error: BaseException | None
) -> None:
    one_shot = folder.stage("prune") / "one_shot" / "metrics.json"
    models = {"pruned": from_json(json.loads(one_shot.read_text()))} if one_shot.exists() else {}
    is_sweep = config.run.stages == ["sweep"]
    report = build_report(
        models=models,
        measured_sparsity=None,
        per_layer_sparsity={},
        target_sparsity=None if is_sweep else config.prune.sparsity,
        perplexity_on=COMPLETIONS[config.evaluate.completions],
        text_path=text_in_words(config),
        pass_at_k=config.evaluate.pass_at_k,
        **facts(config, folder),
    )
    last = stage_before(folder, "evaluate")
    description = RunDescription(
        name=folder.root.resolve().name,
        asked=asked(config, folder, inputs),
        settings=settings(config),
        command=command(config, folder),
        student_path=None if last is None else str(folder.stage(last) / "model"),
        example_prompt=inputs.format(inputs.task.test[0].prompt),
        max_new_tokens=config.evaluate.max_new_tokens,
        pictures=draw(config, folder, report),
        ended=_ended(folder, error),
        other_pages={"Methods side by side": "sweep/table.html"}
        if (folder.stage("sweep") / "table.html").exists()
        else {},
    )
    write_page(
        folder.root / "report.md", render_markdown(report, description), description.pictures
    )


def _ended(folder: RunFolder, error: BaseException | None) -> str:
    """How the run stands, in a sentence or two."""
    records = {name: folder.record(name) for name in STAGES}
    done = [name for name, record in records.items() if record and record["done"]]
    begun = [name for name, record in records.items() if record and not record["done"]]
    told = f"Done: {', '.join(done) or 'no stage'}."
    if error is None:
        return told
    where = f" in stage {begun[-1]}" if begun else ""
    if isinstance(error, Stopped):
        return f"Stopped by {error}{where}; the same command goes on. {told}"
    return f"Failed{where}: {type(error).__name__}: {error}. {told}"
