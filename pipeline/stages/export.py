"""Stage 6: the final student in formats that other software loads, each loaded again and compared.

Whether every format fits the mask is known before any is written. A format's folder appears only
once what it loads as has the student's weights, bit for bit, and its logits: bit for bit too, or to
rounding in fp32 where the sums have another order. `export.json` has bytes and differences.
"""

import copy
import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from pipeline.artifacts import RunFolder, replaced_folder, write_json, write_text
from pipeline.config import Config
from pipeline.evaluation.completions import PROGRESS_DELAY_SECONDS
from pipeline.evaluation.summary import Report
from pipeline.export import hub, packed, semi_structured
from pipeline.export.card import model_card, write_notices
from pipeline.export.formats import (
    FORMATS,
    TOLERANCE,
    differing_weights,
    logits_difference,
    prepared,
    same_logits,
)
from pipeline.export.licence import Licence, find_licence
from pipeline.models.loading import check_same_tokenizer, load_model, load_tokenizer
from pipeline.stages.inputs import TaskInputs, student_source

NUM_PROMPTS = 4
"""Held-out prompts whose logits are compared."""
GPU_TOLERANCE = 0.05
"""Most that 2:4 products on a GPU, in the weights' own dtype, may differ, of the largest logit."""
PUSHED = "hf"
"""The format that `export.push_to_hub` uploads."""

logger = logging.getLogger(__name__)


def run(config: Config, folder: RunFolder, inputs: TaskInputs, out: Path) -> None:
    """Writes, loads and compares every format of `export.formats`."""
    source = student_source(folder, "export")
    licences = _licences(config)
    if config.export.push_to_hub:
        hub.check_name(config.export.push_to_hub, licences)
    dtype = config.export.dtype or config.student.dtype
    student = load_model(str(source / "model"), dtype=dtype)
    multiple = config.prune.width_multiple
    models = {
        name: prepared(name, student, width_multiple=multiple) for name in config.export.formats
    }
    report = _report(folder, source.name)
    sizes = {}
    for name, model in tqdm(models.items(), desc="export", delay=PROGRESS_DELAY_SECONDS):
        with replaced_folder(out / name) as temporary:
            FORMATS[name].save(model, temporary)
            inputs.tokenizer.save_pretrained(temporary)
            card = model_card(
                report,
                base_model=config.student.path,
                teacher=config.teacher.path,
                licences=licences,
                made_by=_made_by(config, folder),
                dtype=dtype,
                measured_dtype=config.student.dtype,
                loading_lines=FORMATS[name].loading_lines,
            )
            write_text(temporary / "README.md", card)
            write_notices(temporary, licences)
            difference = _check(name, student, model, temporary, inputs)
            sizes[name] = _sizes(temporary) | {"largest_logit_difference": difference}
        logger.info("export: %s: loaded again, same logits", out / name)
    write_json(out / "export.json", sizes)
    if config.export.push_to_hub:
        logger.info("export: %s", hub.push(out / PUSHED, config.export.push_to_hub))


def _licences(config: Config) -> list[Licence]:
    """Of the base model and of the teacher."""
    return [
        find_licence(values.path, key, values.revision)
        for key, values in (("student.path", config.student), ("teacher.path", config.teacher))
    ]


def _check(
    name: str,
    student: LlamaForCausalLM,
    written: LlamaForCausalLM,
    folder: Path,
    inputs: TaskInputs,
) -> float:
    """Loads an export again and compares it with the student.

    Returns:
        The largest difference of any logit.

    Raises:
        RuntimeError: It is another model: a fault of ours, or of the disk.
    """
    check_same_tokenizer(inputs.tokenizer, load_tokenizer(str(folder), key="export.formats"))
    loaded = FORMATS[name].load(folder)
    differing = differing_weights(written, loaded)
    if differing:
        raise RuntimeError(f"export {name}: {', '.join(differing)} are not the student's")
    prompts = [inputs.encode(row.prompt) for row in inputs.task.test[:NUM_PROMPTS]]
    if FORMATS[name].exact:
        same, difference = same_logits(student, loaded, prompts), 0.0
    else:
        difference, _ = logits_difference(student, loaded, prompts)
        is_fp32 = student.dtype == torch.float32
        in_fp32 = student if is_fp32 else copy.deepcopy(student).float()
        rounding, largest = logits_difference(in_fp32, loaded.float(), prompts)
        same = rounding <= TOLERANCE * largest
    if name == "semi_structured" and semi_structured.missing() is None:
        difference, largest = logits_difference(student, semi_structured.load(folder), prompts)
        same &= difference <= GPU_TOLERANCE * largest
    if not same:
        raise RuntimeError(f"export {name}: the logits are not the student's")
    return difference


def _sizes(folder: Path) -> dict[str, float]:
    """Bytes of the weights' files, and what packing gains."""
    if (folder / packed.FILE).exists():
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
