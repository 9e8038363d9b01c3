"""Zero- and few-shot tasks of EleutherAI's lm-evaluation-harness, on the model in memory.

The harness is called as a library (extra `eval`): its own prompts, likelihoods and metrics. With
`num_fewshot` a prompt begins with solved examples, drawn as the harness draws them, so that figures
compare with published ones; a task whose own file says 0 keeps 0, as there. A task is shown by the
first metric of `METRICS` that it has, which is how the authors of SDMPrune (arXiv 2506.11120) take
their averages: normalised accuracy before plain accuracy. `crows_pairs` knows only the share of
stereotypes, 0.5 being the unbiased model.

Tasks and their data are opened before anything runs, so that a name that does not exist costs
nothing. Left out: chat templates, tasks that run generated code.
"""

import difflib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import UserError

logger = logging.getLogger(__name__)

METRICS = ("acc_norm", "acc", "pct_stereotype", "exact_match")
"""Fractions in the order in which one stands for its task; a task without any shows its first."""

BOOTSTRAP_DRAWS = 1000
"""For metrics whose standard error has no closed form."""


@dataclass(frozen=True)
class TaskScore:
    """What a model scored on one task."""

    metric: str
    value: float
    stderr: float | None
    """Standard error over the documents; None where the harness knows none."""
    num_documents: int
    num_fewshot: int | None = 0
    """Solved examples in the prompt; None for a group whose tasks differ in it."""


@dataclass(frozen=True)
class HarnessTasks:
    """Opened tasks."""

    opened: dict[str, Any]
    """The harness's own tasks and groups as it loads them, their data too."""
    names: list[str]
    """What is shown of them: a group with a score of its own stands for its tasks."""


def open_harness_tasks(
    names: Sequence[str], include_path: str | None = None, num_fewshot: int = 0
) -> HarnessTasks:
    """Opens tasks by name and loads their data.

    Args:
        names: Tasks, groups or tags of the harness, or of the folder.
        include_path: Folder with task files (YAML) of the user's own.
        num_fewshot: Solved examples in the prompt.

    Raises:
        UserError: The harness is not installed, a name is unknown, data cannot be loaded, or a task
            has not that many examples.
    """
    try:
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"evaluate.zero_shot: needs lm-evaluation-harness, which cannot be imported ({error}). "
            "Install it (pip install -c constraints.txt -e '.[eval]'), or set []."
        ) from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder = None if include_path is None else str(Path(include_path).expanduser())
    manager = _manager(names, folder)
    for name in names:
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            raise UserError(
                f"evaluate.zero_shot: {name!r}: lm-evaluation-harness has no such task. Set "
                f"{' or '.join(near) if near else 'a name that `lm-eval ls tasks` prints'}, or "
                "evaluate.zero_shot_path to the folder of its YAML file."
            )
    opened, shown = [], []
    for name in names:
        found = _load(manager, [name], name)
        group = found["groups"].get(name)
        opened += list(found["tasks"].values()) if group is None else [group]
        stands_alone = group is not None and group.has_aggregation
        shown += [name] if stands_alone else list(found["tasks"])
    loaded = _load(manager, opened, ", ".join(names))
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"evaluate.zero_shot: {name}: runs generated code or shows pictures, which is not "
                "done here. Leave it out."
            )
        _show_examples(name, task, num_fewshot)
    return HarnessTasks(loaded, shown)


def _show_examples(name: str, task: Any, num_fewshot: int) -> None:
    """Sets the number of examples of a task, and tries it on one document."""
    keeps_none = task.get_config("num_fewshot") == 0 or task.OUTPUT_TYPE == "loglikelihood_rolling"
    num_fewshot = 0 if keeps_none else num_fewshot
    task.set_config(key="num_fewshot", value=num_fewshot)
    if num_fewshot == 0:
        return
    try:
        if _shows_what_it_asks(task):
            raise ValueError("it would show what it asks; its file needs a fewshot_split")
        task.fewshot_context(doc=next(iter(task.eval_docs)), num_fewshot=num_fewshot)
    except Exception as error:  # of the harness's samplers, or a task's own code
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"evaluate.num_fewshot: {num_fewshot}: {name}: no such prompts: {text[:300]}. Set "
            "fewer, or leave the task out of evaluate.zero_shot."
        ) from error


def _shows_what_it_asks(task: Any) -> bool:
    """Whether examples come from what is asked, and the harness leaves none out."""
    source = getattr(task, "fewshot_cfg", None)
    if source is None or source.samples:  # a task in Python code leaves out by itself
        return False
    if source.split:  # of which the harness leaves out what it asks, but only in the test split
        return not task.has_test_docs() and source.split == task.config.validation_split
    return not (task.has_training_docs() or task.has_validation_docs())


def _manager(names: Sequence[str], folder: str | None) -> Any:
    """The harness's index of tasks; of the folder alone where that holds all.

    Its own, of some 15,000 files, takes many seconds to make.
    """
    if folder is not None:
        manager = _index(folder, include_defaults=False)
        if all(_holds(manager, name) for name in names):
            return manager
    return _index(folder, include_defaults=True)


def _holds(manager: Any, name: Any) -> bool:
    """Whether an index has a task, or a group with all its members."""
    entry = manager.task_index.get(name) if isinstance(name, str) else None
    members = entry.cfg.get("task") if entry is not None and entry.cfg else None
    return entry is not None and (
        not isinstance(members, list) or all(_holds(manager, member) for member in members)
    )


@cache
def _index(folder: str | None, *, include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=include_defaults)


def _load(manager: Any, tasks: list[Any], named: str) -> dict[str, Any]:
    """What the harness loads, its exceptions as one sentence."""
    try:
        return manager.load(tasks)
    except Exception as error:  # of datasets, the Hub, or a task's own code
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"evaluate.zero_shot: {named}: cannot be loaded: {text[:300]}. Load its data once "
            "with a network (HF_HOME says where it is kept), or leave it out."
        ) from error


def zero_shot_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: HarnessTasks,
    *,
    batch_size: int,
    seed: int,
) -> dict[str, TaskScore]:
    """Runs the tasks; global random state is left as it was.

    Args:
        model: Causal language model in eval mode; it is used where it is.
        tokenizer: Its tokenizer.
        tasks: From `open_harness_tasks`; they can be used again for the next model.
        batch_size: Documents' answers in one forward pass, whose logits are held whole.
        seed: Of what a task draws by chance.

    Returns:
        Task name to its score, in the order of the tasks.
    """
    from lm_eval.defaults import DEFAULT_OTHER_SEED
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    states, cut = (random.getstate(), np.random.get_state()), _CutPrompts()
    on_cuda = model.device.type == "cuda"
    try:
        with cut, torch.random.fork_rng(devices=[model.device] if on_cuda else []):
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            for task in tasks.opened["tasks"].values():
                task.set_fewshot_seed(DEFAULT_OTHER_SEED)  # the same examples for every model
            found = evaluate(  # simple_evaluate would describe the machine too, for seconds
                lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                task_dict=tasks.opened,
                log_samples=False,
                bootstrap_iters=BOOTSTRAP_DRAWS,
            )
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    if cut.count:
        logger.warning(
            "evaluate.zero_shot: prompts longer than the model's %d tokens lost their beginning, "
            "examples first; the harness said so %d times",
            model.config.max_position_embeddings,
            cut.count,
        )
    shots = found["n-shot"]
    return {name: _score(found["results"][name], shots.get(name)) for name in tasks.names}


class _CutPrompts(logging.Filter):
    """Counts, as a context, what the harness says of prompts that it cuts, a line for each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.logger = logging.getLogger("lm_eval.models.huggingface")

    def __enter__(self) -> None:
        self.level = self.logger.level
        self.logger.setLevel(logging.WARNING)
        self.logger.addFilter(self)

    def __exit__(self, *exception: object) -> None:
        self.logger.removeFilter(self)
        self.logger.setLevel(self.level)

    def filter(self, record: logging.LogRecord) -> bool:
        is_cut = "runcat" in record.getMessage()  # truncating, Truncation
        self.count += is_cut
        return not is_cut


def _score(result: dict[str, Any], num_fewshot: int | None) -> TaskScore:
    """The one metric that stands for a task; the harness's keys are `metric,filter`."""
    values = {
        key: value
        for key, value in result.items()
        if "," in key and isinstance(value, int | float) and "_stderr," not in key
    }
    key = min(values, key=lambda key: _rank(key.partition(",")[0]))
    metric, _, chosen_filter = key.partition(",")
    stderr = result.get(f"{metric}_stderr,{chosen_filter}")
    return TaskScore(
        metric=metric,
        value=float(values[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        num_documents=result["sample_len"],
        num_fewshot=num_fewshot,
    )


def _rank(metric: str) -> int:
    """Place in `METRICS`; unknown ones come last, in the task's own order."""
    return METRICS.index(metric) if metric in METRICS else len(METRICS)
