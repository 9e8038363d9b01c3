"""The step suite: a GRPO step of a sparse student with everything on, against TRL's own trainer.

Both sides start from the same random Llama, prompts and seeds, and run the same forward passes: the
frozen teacher here, there a frozen reference model of its size (`beta` > 0). A step is sampling,
rewards, loss, backward and update. Ours has mask, movement and the teacher's term; a refinement is
timed apart, because it comes once in `REFINE_EVERY_STEPS`, and its share is added. The last side
samples half of each group under a second mask for the sparsity bonus, which takes a second round of
sampling, half a forward pass, a refinement and its undoing.

Random weights hardly ever end a completion, so that all of them have the full length. Sides take
turns in blocks of `BLOCK_STEPS` steps, the first of which is not counted; each block sees the same
prompts.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, TrainerCallback
from trl import GRPOTrainer

from launch.benchmarks.shapes import Shape, Shapes, load_shapes
from launch.benchmarks.timing import Side, alternate, ratios, summary
from pipeline.artifacts import MASK_FILE
from pipeline.config import Config
from pipeline.config_loading import load_config
from pipeline.models.prunable import apply_masks, prunable_weights
from pipeline.models.teacher import completion_log_probs
from pipeline.sparsity.masks import save_masks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule
from pipeline.sparsity.schedule import RefinementSchedule
from pipeline.sparsity.threshold import masks_by_score
from pipeline.stages.grpo import as_dataset
from pipeline.stages.inputs import TaskInputs, open_task
from pipeline.training.arguments import grpo_arguments
from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from pipeline.training.sparse_trainer import Sparsity
from rewards.mix import build_rewards

ROOT = Path(__file__).resolve().parents[2]
TRL, OURS, TWO_MASKS = "TRL, reference model", "everything on", "and a second mask"
GOAL = 1.05
"""Most that a step with everything on may take, in steps of TRL's."""
SHAPE = "125M"
COMPLETION_TOKENS = 32
BLOCK_STEPS = 3
REFINE_EVERY_STEPS = 10
"""As in configs/quickstart.yaml."""
SPARSITY = 0.7
SCHEDULE = RefinementSchedule(
    start_sparsity=SPARSITY,
    final_sparsity=0.9,
    begin_step=1000,
    end_step=2000,
    every_steps=REFINE_EVERY_STEPS,
    regrow_fraction=0.05,
)
"""Begins after all that is timed; the second mask is its first that is sparser."""


class Timer(TrainerCallback):
    """Seconds of every step of a block but the first."""

    def __init__(self):
        """Nothing is measured yet."""
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        """Starts the clock."""
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        self.clock, self.started = clock, clock()

    def on_step_end(self, args, state, control, **kwargs):
        """Notes the time."""
        if state.global_step > 1:
            self.seconds.append(self.clock() - self.started)


def run(config: Path, num_steps: int) -> dict:
    """Measures the shape `SHAPE` of a YAML file.

    Args:
        config: The file.
        num_steps: Steps of each side, at least 2; whole blocks are run.

    Raises:
        UserError: The file is at fault.
    """
    return compare(load_shapes(config, Shapes).shapes[SHAPE], num_steps)


def compare(shape: Shape, num_steps: int) -> dict:
    """Medians of a step of each side, of its parts, and the ratios to TRL's.

    Args:
        shape: Model, and `batch_size` completions, one group.
        num_steps: Steps of each side.
    """
    overrides = {
        "grpo.max_steps": BLOCK_STEPS,
        "grpo.per_device_train_batch_size": shape.batch_size,
        "grpo.num_generations": shape.batch_size,
        "grpo.max_completion_length": COMPLETION_TOKENS,
        "grpo.lr_scheduler_type": "constant",
        "grpo.learning_rate": 1e-6,
        "grpo.save_strategy": "no",
        "grpo.disable_tqdm": True,
    }
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    inputs = open_task(config)
    torch.manual_seed(0)
    model = shape.model("cpu")
    model.generation_config.pad_token_id = inputs.tokenizer.pad_token_id
    model.generation_config.eos_token_id = inputs.tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        ours = our_trainer(config, inputs, model, Path(folder))
        theirs = trl_trainer(config, inputs, Path(folder))
        seconds = steps_in_turn(ours, theirs, num_steps)
        found = {name: summary(values) for name, values in seconds.items()}
        parts = parts_of_a_step(ours, theirs, inputs)
    refining = parts["refinement"]["median"] / REFINE_EVERY_STEPS
    compared = {
        name: ratios([value + refining for value in seconds[name]], seconds[TRL])
        for name in (OURS, TWO_MASKS)
    }
    return {
        "num_weights": sum(p.numel() for p in model.parameters()),
        "batch_size": shape.batch_size,
        "completion_tokens": COMPLETION_TOKENS,
        "num_steps": len(seconds[TRL]),
        "seconds": found,
        "parts": parts,
        "refine_every_steps": REFINE_EVERY_STEPS,
        "ratio_to_trl": compared,
        "goal": GOAL,
        "met": compared[OURS]["median"] <= GOAL,
    }


def our_trainer(
    config: Config, inputs: TaskInputs, model: LlamaForCausalLM, folder: Path
) -> TeacherGRPOTrainer:
    """The pipeline's trainer with all terms, under magnitude masks."""
    functions, weights = build_rewards(["correctness"], None, inputs.verifier)
    teacher = copy.deepcopy(model)
    sizes = {name: weight.detach().abs() for name, weight in prunable_weights(model).items()}
    masks = masks_by_score(sizes, SPARSITY, "matrix")
    apply_masks(model, masks)
    save_masks(folder / MASK_FILE, masks)
    trainer = TeacherGRPOTrainer(
        model=model,
        reward_funcs=functions,
        args=grpo_arguments(config, folder / "ours", weights),
        train_dataset=as_dataset(inputs.task.train, inputs),
        processing_class=inputs.tokenizer,
        teacher=teacher,
        teacher_kl_weight=config.rewards.teacher_kl_weight,
        num_masks=2,
        sparsity_weight=1.0,
    )
    trainer.add_sparsity(
        Sparsity(
            source=folder,
            schedule=SCHEDULE,
            rule=RefinementRule(
                scope="matrix",
                score="magnitude",
                movement_weight=0.5,
                protect_steps=20,
                min_density=0.0,
            ),
            movement=MovementRule(half_life_steps=config.movement.half_life_steps),
            first_step=0,
            stage="grpo",
        )
    )
    return trainer


def trl_trainer(config: Config, inputs: TaskInputs, folder: Path) -> GRPOTrainer:
    """TRL's trainer of the dense model with TRL's reference model and the same reward."""
    functions, weights = build_rewards(["correctness"], None, inputs.verifier)
    arguments = grpo_arguments(config, folder / "trl", weights)
    arguments.beta = 0.04
    return GRPOTrainer(
        model=LlamaForCausalLM.from_pretrained(folder / "model"),
        reward_funcs=functions,
        args=arguments,
        train_dataset=as_dataset(inputs.task.train, inputs),
        processing_class=inputs.tokenizer,
    )


def steps_in_turn(
    ours: TeacherGRPOTrainer, theirs: GRPOTrainer, num_steps: int
) -> dict[str, list[float]]:
    """Side to seconds of each step."""
    two_masks = ours.two_masks
    timers = {name: Timer() for name in (TRL, OURS, TWO_MASKS)}
    while len(timers[TRL].seconds) < num_steps:
        for name, timer in timers.items():
            trainer = theirs if name == TRL else ours
            ours.two_masks = two_masks if name == TWO_MASKS else None
            trainer.add_callback(timer)
            torch.manual_seed(len(timer.seconds))
            trainer.train()
            trainer.remove_callback(timer)
    return {name: timer.seconds for name, timer in timers.items()}


def parts_of_a_step(
    ours: TeacherGRPOTrainer, theirs: GRPOTrainer, inputs: TaskInputs
) -> dict[str, dict]:
    """What the teacher's forward pass costs, TRL's reference model beside it, and a refinement."""
    prompt = inputs.encode(inputs.task.train[0].prompt)
    batch_size, tokens = ours.args.per_device_train_batch_size, COMPLETION_TOKENS
    ids = torch.randint(len(inputs.tokenizer), (batch_size, len(prompt) + tokens))
    batch = ids, torch.ones_like(ids), tokens

    @torch.no_grad()
    def reference() -> None:
        theirs._get_per_token_logps_and_entropies(theirs.ref_model, *batch, batch_size=batch_size)

    def teacher() -> None:
        completion_log_probs(ours.teacher, *batch, **ours._teacher_arguments())

    def refine() -> None:
        ours.sparsity.refine(SPARSITY, SCHEDULE.regrow_fraction, step=10**6)

    sides: dict[str, Callable] = {
        "TRL's reference model": reference,
        "teacher": teacher,
        "refinement": refine,
    }
    seconds = alternate(
        {name: Side(side, once=True) for name, side in sides.items()}, torch.device("cpu"), 3
    )
    return {name: summary(values) for name, values in seconds.items()}


def show(result: dict) -> None:
    """Prints the medians, and whether the goal is met."""
    for name, figures in (result["seconds"] | result["parts"]).items():
        print(f"{name:24}{figures['median']:9.3f} s")
    for name, figures in result["ratio_to_trl"].items():
        lower, upper = figures["quartiles"]
        print(f"{name} / {TRL}: {figures['median']:.3f} ({lower:.3f} to {upper:.3f})")
    print(f"goal {result['goal']}: {'met' if result['met'] else 'MISSED'}")
