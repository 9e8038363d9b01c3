"""Names and simple types of TRL's configuration keys, read without importing TRL.

`from trl import GRPOConfig` takes seconds; a misspelt key should be reported at once. So the
annotated fields of its dataclasses, and of transformers' below them, are read from the installed
source with `ast`, base class first.
A type is checked only where its annotation is made of bool, int, float, str, list, dict and None;
TRL's own checks follow when its config classes are built.

`REFUSED` lists the keys the pipeline must own, each with the reason and what to do instead.
"""

import ast
import importlib.metadata
import importlib.util
import math
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

_BASES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
)
_SOURCES = {  # base class first
    "distill": (*_BASES, ("trl", "trainer/sft_config.py", "SFTConfig")),
    "on_policy": (*_BASES, ("trl", "trainer/distillation_config.py", "DistillationConfig")),
    "grpo": (*_BASES, ("trl", "trainer/grpo_config.py", "GRPOConfig")),
}

_STAGES = ("the stages say what runs", "use run.stages instead")
_NO_EVALUATION = ("the pipeline measures on its own prompts", "set evaluate.every_steps instead")
_LOADING = ("the pipeline loads the models itself", "set student.dtype or student.path instead")
_RESUME = ("the pipeline finds the checkpoint itself", "use --resume instead")
_ONE_LOSS = ("the loss is KL and cross-entropy", "set distill.kl_weight, distill.ce_weight instead")
_ROWS = ("rows are cached completions of the teacher, one a row", "leave it out")
_TOKENIZER = ("teacher and student share the student's tokenizer as it is", "leave it out")
_CHAT_TEMPLATE = (
    "training and evaluation share one chat template with a fixed date",
    "leave it out",
)
_FSDP = (
    "masks know plain, DDP and DeepSpeed training",
    "use an accelerate config file with DeepSpeed instead",
)
_MOVING_REFERENCE = (
    "the reference that moves stands in no checkpoint, so a resumed run would be another one",
    "set grpo.beta alone for a fixed reference, or rewards.teacher_kl_weight instead",
)
REFUSED_ALWAYS = {
    "output_dir": ("the run folder holds every stage's checkpoints", "use --output_dir instead"),
    "overwrite_output_dir": ("nothing is overwritten", "use --resume redo instead"),
    "seed": ("one seed serves all stages", "set run.seed instead"),
    "data_seed": ("one seed serves all stages", "set run.seed instead"),
    "resume_from_checkpoint": _RESUME,
    "do_train": _STAGES,
    "do_eval": _STAGES,
    "do_predict": _STAGES,
    "eval_strategy": _NO_EVALUATION,
    "eval_on_start": _NO_EVALUATION,
    "load_best_model_at_end": (
        "an earlier checkpoint may have an earlier mask, not the final sparsity",
        "set evaluate.every_steps instead, which keeps the best student that has it",
    ),
    "save_only_model": ("a checkpoint without optimizer state cannot be resumed", "leave it out"),
    "save_on_each_node": (
        "the machines share one run folder, and would write over each other there",
        "leave it out",
    ),
    "ignore_data_skip": ("a resumed run would see the same rows again", "leave it out"),
    "enable_jit_checkpoint": (
        "SIGTERM already saves a whole checkpoint, and it would take that signal away",
        "leave it out",
    ),
    "accelerator_config": (
        "its ways of sharing out batches are not those that resuming counts by",
        "leave it out",
    ),
    "auto_find_batch_size": (
        "it starts training again under a mask that has moved on",
        "lower per_device_train_batch_size instead",
    ),
    "remove_unused_columns": ("the rewards read the answer column", "leave it out"),
    "model_init_kwargs": _LOADING,
    "trust_remote_code": (
        "the pipeline loads the models itself",
        "set student.trust_remote_code instead",
    ),
    "deepspeed": (
        "the launcher sets it up for all stages",
        "name a DeepSpeed file in accelerate launch --config_file instead",
    ),
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "parallelism_config": ("it is a Python object, which YAML cannot hold", "leave it out"),
    "local_rank": ("the launcher sets it", "leave it out"),
    "hub_token": ("it would be written to the run folder", "set HF_TOKEN in the environment"),
}
REFUSED = {
    "distill": {
        **REFUSED_ALWAYS,
        "loss_type": _ONE_LOSS,
        "label_smoothing_factor": _ONE_LOSS,
        "completion_only_loss": _ROWS,
        "assistant_only_loss": _ROWS,
        "dataset_text_field": _ROWS,
        "dataset_kwargs": _ROWS,
        "packing": _ROWS,
        "eval_packing": _ROWS,
        "padding_free": _ROWS,
        "chat_template_path": _TOKENIZER,
        "eos_token": _TOKENIZER,
        "pad_token": _TOKENIZER,
    },
    "on_policy": {
        **REFUSED_ALWAYS,
        "teacher_model_name_or_path": (_LOADING[0], "set teacher.path instead"),
        "teacher_model_revision": (_LOADING[0], "set teacher.revision instead"),
        "teacher_model_init_kwargs": (_LOADING[0], "set teacher.dtype instead"),
        "chat_template_kwargs": _CHAT_TEMPLATE,
        "max_tool_calling_iterations": ("the student has no tools", "leave it out"),
    },
    "grpo": {
        **REFUSED_ALWAYS,
        "reward_weights": ("rewards have their own section", "set rewards.weights instead"),
        "sync_ref_model": _MOVING_REFERENCE,
        "ref_model_mixup_alpha": _MOVING_REFERENCE,
        "ref_model_sync_steps": _MOVING_REFERENCE,
        "chat_template_kwargs": _CHAT_TEMPLATE,
    },
}
SECRETS = ("hub_token",)

_NAMES = {
    "bool": "true or false",
    "int": "an int",
    "float": "a float",
    "str": "a string",
    "list": "a list",
    "dict": "a mapping",
    "NoneType": "null",
}
_AT_LEAST = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "num_iterations": 1,
    "steps_per_generation": 1,
    "generation_batch_size": 1,
    "max_completion_length": 1,
    "max_length": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "adam_beta1": 0,
    "adam_beta2": 0,
    "beta": 0,
}
_MORE_THAN = {"temperature": 0, "save_steps": 0, "logging_steps": 0, "num_train_epochs": 0}
"""Least values of numbers that TRL, transformers or torch would refuse late, or not at all."""
_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict}
_ALSO_ACCEPTED = {"scale_rewards": bool}  # GRPOConfig turns true into group, false into none


@cache
def trl_fields(section: str) -> dict[str, frozenset[type] | None]:
    """Reads the fields that a TRL config class takes.

    Args:
        section: `distill` (trl.SFTConfig), `on_policy` (trl.DistillationConfig) or `grpo`
            (trl.GRPOConfig).

    Returns:
        Field name to the types its annotation allows; None where it is more than simple types.

    Raises:
        UserError: trl or transformers is not installed, or keeps the class elsewhere.
    """
    fields: dict[str, frozenset[type] | None] = {}
    for package, file, class_name in _SOURCES[section]:
        for statement in _class_body(package, file, class_name):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                fields[statement.target.id] = _simple_types(statement.annotation)
    for name, accepted in _ALSO_ACCEPTED.items():
        if fields.get(name):
            fields[name] |= {accepted}
    return fields


def settable_keys(section: str) -> list[str]:
    """Lists TRL's keys that a section takes, in TRL's order."""
    return [name for name in trl_fields(section) if name not in REFUSED[section]]


def trl_value_fault(section: str, key: str, value: Any) -> tuple[str, str] | None:
    """Checks one value that is meant for TRL.

    Args:
        section: `distill`, `on_policy` or `grpo`.
        key: One of `settable_keys(section)`.
        value: What YAML gave.

    Returns:
        The reason and the remedy, or None where nothing is wrong so far.
    """
    types = trl_fields(section)[key]
    if types is not None and not _matches(value, types):
        names = [_NAMES[kind.__name__] for kind in sorted(types, key=_type_order)]
        wanted = " or ".join(names)
        return f"must be {wanted}", f"set {wanted} instead"
    if isinstance(value, int | float):
        if value < _AT_LEAST.get(key, -math.inf):
            return f"must be {_AT_LEAST[key]} or more", f"set {_AT_LEAST[key]} or more instead"
        if value <= _MORE_THAN.get(key, -math.inf):
            return "must be more than 0", "set more than 0 instead"
    if key == "save_strategy" and value == "best":
        return "nothing is measured that could be best", "set steps instead"
    if key == "train_sampling_strategy" and value == "group_by_length":
        return (
            "its order stands in no checkpoint, so a resumed run would see other rows",
            "set random or sequential instead",
        )
    if key == "save_total_limit" and value is not None and value < 2:
        return (
            "a crash while saving would leave no whole checkpoint",
            "set 2 or more, or null, instead",
        )
    return None


def _type_order(kind: type) -> int:
    """Position of a type in messages, null last."""
    return list(_NAMES).index(kind.__name__)


def _matches(value: Any, types: frozenset[type]) -> bool:
    """Whether a YAML value has one of the types; an int is a float, a bool is not an int."""
    if isinstance(value, float) and math.isnan(value):
        return False
    return type(value) in types or (type(value) is int and float in types)


@cache
def _class_body(package: str, file: str, class_name: str) -> list[ast.stmt]:
    """Statements of a class in an installed package, without importing the package."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{package} is not installed; install this project (pip install -e .) in the "
            "environment that runs it"
        )
    path = Path(spec.submodule_search_locations[0]) / file
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        tree = ast.Module(body=[], type_ignores=[])
    for statement in tree.body:
        if isinstance(statement, ast.ClassDef) and statement.name == class_name:
            return statement.body
    raise UserError(
        f"{package} {importlib.metadata.version(package)}: no class {class_name} in {path}, so "
        "the keys of distill, on_policy and grpo are unknown; install the versions that "
        "pyproject.toml names"
    )


def _simple_types(annotation: ast.expr) -> frozenset[type] | None:
    """Types that an annotation allows: `int | None` -> {int, NoneType}; None if not simple."""
    match annotation:
        case ast.Constant(value=None):
            return frozenset({type(None)})
        case ast.Name(id=name) | ast.Subscript(value=ast.Name(id=name)) if name in _TYPES:
            return frozenset({_TYPES[name]})
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            sides = _simple_types(left), _simple_types(right)
            return None if None in sides else sides[0] | sides[1]
    return None
