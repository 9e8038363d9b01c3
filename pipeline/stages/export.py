"""Stage 6: the final student in formats that other software loads, each loaded again and compared.

A format's folder appears only once what it loads as has the student's weights and logits, bit for
bit. `export.json` has the bytes. Left out: uploading.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from transformers import LlamaForCausalLM

from pipeline.artifacts import RunFolder, replaced_folder, write_json, write_text
from pipeline.config import Config
from pipeline.evaluation.summary import Report
from pipeline.export import packed
from pipeline.export.card import model_card
from pipeline.export.formats import FORMATS, differing_weights, same_logits
from pipeline.models.loading import check_same_tokenizer, load_model, load_tokenizer
from pipeline.stages.inputs import TaskInputs, student_source

NUM_PROMPTS = 4
"""Held-out prompts whose logits are compared."""

logger = logging.getLogger(__name__)


def run(config: Config, folder: RunFolder, inputs: TaskInputs, out: Path) -> None:
    """Writes, loads and compares every format of `export.formats`."""
    source = student_source(folder, "export")
    dtype = config.export.dtype or config.student.dtype
    student = load_model(str(source / "model"), dtype=dtype)
    report = _report(folder, source.name)
    sizes = {}
    for name in config.export.formats:
        with replaced_folder(out / name) as temporary:
            FORMATS[name].save(student, temporary)
            inputs.tokenizer.save_pretrained(temporary)
            card = model_card(
                report,
                base_model=config.student.path,
                teacher=config.teacher.path,
                made_by=_made_by(config, folder),
                dtype=dtype,
                measured_dtype=config.student.dtype,
                loading_lines=FORMATS[name].loading_lines,
            )
            write_text(temporary / "README.md", card)
            _check(name, student, temporary, inputs)
            sizes[name] = _sizes(name, temporary)
        logger.info("export: %s: loaded again, same logits", out / name)
    write_json(out / "export.json", sizes)


def _check(name: str, student: LlamaForCausalLM, folder: Path, inputs: TaskInputs) -> None:
    """Loads an export again and compares it with the student.

    Raises:
        RuntimeError: It is another model: a fault of ours, or of the disk.
    """
    check_same_tokenizer(inputs.tokenizer, load_tokenizer(str(folder), key="export.formats"))
    loaded = FORMATS[name].load(folder)
    differing = differing_weights(student, loaded)
    if differing:
        raise RuntimeError(f"export {name}: {', '.join(differing)} are not the student's")
    prompts = [inputs.encode(row.prompt) for row in inputs.task.test[:NUM_PROMPTS]]
    if not same_logits(student, loaded, prompts):
        raise RuntimeError(f"export {name}: the logits are not the student's")


def _sizes(name: str, folder: Path) -> dict[str, float]:
    """Bytes of the weights' files, and what packing gains."""
    if name == "packed":
        return asdict(packed.measure(folder))
    return {"file_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def _report(folder: RunFolder, last: str) -> Report | None:
    """report.json, if it is about the student that stage `last` left."""
    evaluated, trained = folder.record("evaluate"), folder.record(last)
    if not (evaluated and trained and evaluated["done"]):
        return None
    seen = evaluated["inputs"]["files of earlier stages"].get(last)
    if seen != trained["outputs"]:
        return None
    return json.loads((folder.root / "report.json").read_text())


def _made_by(config: Config, folder: RunFolder) -> str:
    """The stages that led to the student."""
    done = [stage for stage in ("distill", "on_policy", "grpo") if folder.is_done(stage)]
    prune = config.prune
    pruned = f"prune ({prune.method}, redistribution {prune.redistribution})"
    return ", ".join([pruned, *done])
