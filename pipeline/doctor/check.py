"""`--check`: what is wrong with a run, and what it will need, before anything is loaded or written.

It goes through the run's own checks (config, TRL's arguments, topology, task, columns, tokenizers,
verifier, the run folder's records), reads model shapes without weights, and says in a table what
each layout would need. Launched as the run will be, it knows the ranks and the layout; as one
process it shows eight ranks too. Faults come together, at the end.

Memory is an estimate: on an accelerator a launch that does not fit is a fault; a machine without
one may be where the run is planned, so there it is only said.

Left out: whether a model that is only on the Hub can be downloaded whole, sweeps, and time.
"""

from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artifacts import RunFolder
from pipeline.config import TRAINING_STAGES, Config
from pipeline.doctor.batches import batch_line
from pipeline.doctor.disk import existing_bytes, free_bytes, permission_fault, run_bytes
from pipeline.doctor.memory import LAYOUTS
from pipeline.doctor.plan import Launch, Row, available_memory, memory_row, pass_of
from pipeline.doctor.shapes import NO_WEIGHTS, ModelShape, meta_model, shape_of, weight_file_fault
from pipeline.doctor.table import count_text, fact_lines, memory_lines, size_text
from pipeline.errors import UserError
from pipeline.models.loading import load_architecture
from pipeline.models.paths import resolve_model
from pipeline.ranks import is_main
from pipeline.rules.batches import prompt_fault
from pipeline.run import open_inputs, quiet_libraries, resumed_checkpoint
from pipeline.stages.inputs import TaskInputs
from pipeline.stages.provenance import stage_to_redo
from pipeline.training.arguments import (
    check_trl_values,
    distill_arguments,
    forget_deepspeed,
    grpo_arguments,
    on_policy_arguments,
)

ARGUMENTS = {
    "distill": distill_arguments,
    "on_policy": on_policy_arguments,
    "grpo": grpo_arguments,
}
PROMPTS_LOOKED_AT = 1000
PLANNED_RANKS = 8

Facts = list[tuple[str, str]]


def check(config: Config, *, output_dir: Path, resume: str = "auto") -> None:
    """Prints the plan of a run. Every rank calls it; rank 0 prints.

    Args:
        config: Checked configuration.
        output_dir: The run folder, which need not exist and is left as it is.
        resume: As for `run`.

    Raises:
        UserError: What would stop the run, every fault that was found.
    """
    quiet_libraries()
    check_trl_values(config)
    stages = [stage for stage in config.run.stages if stage in TRAINING_STAGES]
    arguments = {stage: ARGUMENTS[stage](config, Path("unused")) for stage in stages}
    forget_deepspeed()
    if not is_main():
        return
    inputs = open_inputs(config)
    facts: Facts = []
    faults: list[str] = []
    shapes = _read_shapes(config, facts, faults)
    longest = _describe_task(config, inputs, facts)
    for stage, values in arguments.items():
        rows = config.distill.rollouts if stage == "distill" else len(inputs.task.train)
        facts.append((stage, batch_line(stage, values, rows)))
    faults += filter(None, [prompt_fault(config, len(inputs.task.train))])
    _describe_folder(config, output_dir, resume, facts, faults)
    table = []
    if arguments:
        launch = Launch.of(next(iter(arguments.values())))
        is_zero = launch.layout != "plain"
        wanted = run_bytes(config, shapes["student"], arguments, is_zero=is_zero)
        _describe_disk(output_dir, wanted, facts, faults)
        table = _describe_memory(config, arguments, launch, longest, shapes, facts, faults)
    print("\n".join([*fact_lines(facts), *table]))
    if faults:
        raise UserError("\n".join(faults))


def _read_shapes(config: Config, facts: Facts, faults: list[str]) -> dict[str, ModelShape]:
    """Shapes of student and teacher; says what their files lack."""
    shapes = {}
    for role in ("student", "teacher"):
        values, key = getattr(config, role), f"{role}.path"
        architecture = load_architecture(
            values.path,
            key=key,
            revision=values.revision,
            trust_remote_code=getattr(values, "trust_remote_code", False),
        )
        model = meta_model(architecture)
        shape = shapes[role] = shape_of(model)
        text = (
            f"{values.path}: {count_text(shape.num_weights)} weights, "
            f"{count_text(shape.num_prunable)} prunable, {shape.num_layers} layers, "
            f"{shape.vocabulary} tokens"
        )
        folder = Path(resolve_model(values.path, key))
        fault = weight_file_fault(model, folder) if folder.is_dir() else None
        if fault == NO_WEIGHTS:
            text += f"; {fault}, shapes from config.json alone"
        elif fault is not None:
            faults.append(f"{key}: {values.path!r}: {fault}; set a whole model")
        facts.append((role, text))
    return shapes


def _describe_task(config: Config, inputs: TaskInputs, facts: Facts) -> int:
    """Tokens of the longest prompt among the first training prompts."""
    task = inputs.task
    longest = max(len(inputs.encode(row.prompt)) for row in task.train[:PROMPTS_LOOKED_AT])
    counts = ", ".join(
        f"{len(getattr(task, split))} {split}"
        for split in ("train", "calibration", "probe", "test")
    )
    facts.append(("task", f"{config.task.path}: {counts} rows; longest prompt {longest} tokens"))
    return longest


def _describe_folder(
    config: Config, output_dir: Path, resume: str, facts: Facts, faults: list[str]
) -> None:
    """Where the run folder stands, and whether this config may go on and write there."""
    folder = RunFolder(output_dir)
    done = [stage for stage in config.run.stages if folder.is_done(stage)]
    text = f"{output_dir}: "
    text += f"{', '.join(done)} done before" if done else "nothing done yet"
    facts.append(("run folder", text))
    try:
        resumed_checkpoint(config, folder, resume)
        moved = stage_to_redo(config, folder, resume)
    except UserError as error:
        faults.append(str(error))
    else:
        if moved is not None:
            facts.append(("", f"--resume redo would move {moved} and the later stages to old/"))
    fault = permission_fault(output_dir)
    if fault is not None:
        faults.append(
            f"--output_dir: {str(output_dir)!r} cannot be written ({fault}); set a folder you may "
            "write to"
        )


def _describe_disk(output_dir: Path, wanted: float, facts: Facts, faults: list[str]) -> None:
    """What the run will leave on disk, and whether there is room for it."""
    held, free = existing_bytes(output_dir), free_bytes(output_dir)
    facts.append(
        ("disk", f"{size_text(wanted)} for models and checkpoints, {size_text(free)} free")
    )
    if wanted - held > free:
        faults.append(
            f"--output_dir: {str(output_dir)!r} has {size_text(free)} free and models and "
            f"checkpoints take {size_text(wanted)}; set save_total_limit: 2, a larger save_steps, "
            "or a folder on a larger disk"
        )


def _describe_memory(
    config: Config,
    arguments: dict[str, Any],
    launch: Launch,
    longest: int,
    shapes: dict[str, ModelShape],
    facts: Facts,
    faults: list[str],
) -> list[str]:
    """The table for the stage that needs most memory in the layout that was launched."""
    row_of = {}
    for stage, values in arguments.items():
        work = pass_of(config, stage, values, longest)
        needs_teacher = stage != "grpo" or config.rewards.teacher_kl_weight > 0
        seen = shapes if needs_teacher else {"student": shapes["student"]}
        row_of[stage] = partial(memory_row, config, stage, values, work, seen)
    launched = {
        stage: row(launch.layout, launch.num_ranks, launch.offload) for stage, row in row_of.items()
    }
    stage = max(launched, key=lambda name: launched[name].total)
    text, fits = _describe_fit(stage, launched[stage], launch)
    facts.append(("launch", text))
    if not fits and launch.device != "cpu":
        faults.append(
            f"{stage}.per_device_train_batch_size: "
            f"{arguments[stage].per_device_train_batch_size}: {text}; halve it and double "
            f"{stage}.gradient_accumulation_steps, or launch a layout that fits"
        )
    sizes = [launch.num_ranks] if launch.num_ranks > 1 else [1, PLANNED_RANKS]
    rows = [
        row_of[stage](layout, num_ranks, launch.offload)
        for num_ranks in sizes
        for layout in LAYOUTS
    ]
    return ["", *memory_lines(stage, rows, launch)]


def _describe_fit(stage: str, row: Row, launch: Launch) -> tuple[str, bool]:
    """What was launched, and whether it fits."""
    memory, host = available_memory(launch)
    on_device = row.total + (row.host if launch.device == "cpu" else 0)
    ranks = f"{launch.num_ranks} process{'es' if launch.num_ranks > 1 else ''}"
    text = (
        f"{ranks}, {launch.layout} on {launch.device}: {stage} needs {size_text(on_device)} of "
        f"{size_text(memory)}"
    )
    if launch.device != "cpu" and row.host:
        text += f", and {size_text(row.host)} of the host's {size_text(host)}"
    fits = on_device <= memory and row.host <= host
    return text if fits else f"{text}, which does not fit", fits
