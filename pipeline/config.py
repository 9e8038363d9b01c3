"""The typed configuration: one frozen pydantic model per section, one docstring per key.

A key's docstring is its manual: `launch/train.py --help` prints it, so it says meaning and unit.

Left out: rules that tie two or more keys together (`rules/`), the names and types that
belong to TRL (`trl_keys.py`), YAML and command-line values (`config_loading.py`). A `Config` built
directly, as in a test, is checked key by key only; `load_config` applies every rule.
"""

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

from pipeline.errors import UserError

STAGES = ("prune", "distill", "on_policy", "grpo", "evaluate", "export", "sweep")
TRAINING_STAGES = ("distill", "on_policy", "grpo")
VERIFIERS = ("exact", "numeric", "gsm8k", "math")
REWARDS = ("correctness", "format")
SCOPES = ("matrix", "model", "row")

END_FRACTION = 0.6
"""Share of the refining steps after which the final sparsity is reached, where none is set. The
rest trains the last mask."""


class ConfigError(UserError):
    """Faults in the configuration: every one of them, one a line."""


def _in_order(stages: list[str]) -> list[str]:
    """Accepts stages in the order of `STAGES`, each at most once."""
    wanted = [name for name in STAGES if name in stages]
    if stages != wanted:
        raise PydanticCustomError(
            "stage_order",
            "stages run in the order {order}, each once",
            {"order": ", ".join(STAGES), "remedy": f"set [{', '.join(wanted)}] instead"},
        )
    return stages


def _known_or_dotted(known: tuple[str, ...]) -> AfterValidator:
    """Accepts one of `known`, or the dotted path of a function (`my.module:function`)."""

    def check(name: str) -> str:
        if name in known or re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
            return name
        near = difflib.get_close_matches(name, known, n=1)
        raise PydanticCustomError(
            "name",
            "not a known name, and not a function written my.module:function",
            {"remedy": f"set {near[0] if near else ' or '.join(known)} instead"},
        )

    return AfterValidator(check)


def _scope(scope: str) -> str:
    """Accepts one of `SCOPES`, or N:M with 0 < N < M."""
    pattern = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", scope)
    if scope in SCOPES or (pattern and int(pattern[1]) < int(pattern[2])):
        return scope
    near = difflib.get_close_matches(scope, SCOPES, n=1)
    raise PydanticCustomError(
        "scope",
        "not a known scope, and not N:M with 0 < N < M",
        {"remedy": f"set {near[0] if near else 'matrix, model, row or N:M such as 2:4'} instead"},
    )


Dtype = Literal["float32", "bfloat16"]
Name = Annotated[str, Field(min_length=1)]


class _Section(BaseModel):
    """A part of the configuration: immutable, no silent conversion, no unknown key."""

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class _TrlSection(_Section):
    """A part that also takes the names of a TRL config class and hands them on untouched."""

    model_config = ConfigDict(extra="allow")

    @property
    def trl_values(self) -> dict[str, Any]:
        """TRL's own keys as they were given: the keyword arguments for its config class."""
        return dict(self.model_extra or {})


class RunConfig(_Section):
    """The run as a whole."""

    seed: int = Field(42, ge=0, lt=2**32)
    """Seed of every random choice: data, sampling, training, ties in random masks."""
    stages: Annotated[
        list[Literal["prune", "distill", "on_policy", "grpo", "evaluate", "export", "sweep"]],
        AfterValidator(_in_order),
    ] = Field(["prune", "distill", "grpo", "evaluate"], min_length=1)
    """Stages to run, in this order; `--stages a,b` is short for it; on_policy, between distill and
    grpo, and export run where they are named; sweep runs alone."""
    save_minutes: float | None = Field(None, gt=0)
    """Save a checkpoint of a training stage when the last one is this old, besides every save_steps
    optimizer steps; null saves by steps only."""


class StudentConfig(_Section):
    """The model that is pruned."""

    path: Name = "bundled"
    """Local folder, Hub id, or `bundled`, the small arithmetic Llama that comes along."""
    revision: Name | None = None
    """Commit, tag or branch on the Hub; null is the newest."""
    dtype: Dtype = "float32"
    """Type of the weights in memory; training needs float32 (bf16 autocast is grpo.bf16)."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model; only for sources you trust."""


class TeacherConfig(_Section):
    """The dense model the student learns from; never trained."""

    path: Name = "bundled"
    """Local folder, Hub id, or `bundled`; its tokenizer must be the student's."""
    revision: Name | None = None
    """Commit, tag or branch on the Hub; null is the newest."""
    dtype: Dtype = "float32"
    """Type of the weights in memory; bfloat16 halves the teacher's memory."""
    micro_batch_size: int = Field(64, ge=1)
    """Sequences in one teacher forward pass of grpo; lower it when memory runs out. In distill and
    on_policy the teacher sees the student's batch."""
    placement: Literal["device", "cpu", "zero3"] = "device"
    """In on_policy and grpo: beside the student, in the host's memory (grpo alone), or in pieces on
    all ranks (ZeRO-3)."""


class TaskConfig(_Section):
    """Where prompts and answers come from, and what counts as correct."""

    path: Name = "bundled"
    """Local .jsonl file or dataset folder, Hub id, or `bundled`, generated arithmetic prompts."""
    subset: Name | None = None
    """Name of the Hub dataset's configuration, for example main for openai/gsm8k."""
    prompt_column: Name = "prompt"
    """Column that holds the prompt."""
    answer_column: Name = "answer"
    """Column that holds the reference answer."""
    instruction: str = ""
    """Text added to each prompt after a blank line; empty adds nothing."""
    verifier: Annotated[str, _known_or_dotted(VERIFIERS)] = "exact"
    """exact, numeric, gsm8k, math, or your own function as my.module:function."""
    time_limit_seconds: float = Field(2.0, gt=0)
    """Processor time that math or your own verifier has per completion; by the clock 5 times as
    long."""
    num_train: int = Field(20000, ge=1)
    """Training prompts to generate (bundled task only)."""
    num_calibration: int = Field(256, ge=1)
    """Prompts set aside for calibration."""
    num_probe: int = Field(256, ge=1)
    """Prompts set aside for judging masks and students during training."""
    num_test: int = Field(2000, ge=1)
    """Held-out prompts for evaluation, the same for all models, at most."""


class CalibrationConfig(_Section):
    """The text on which pruning measures activations and gradients."""

    source: Literal["rollouts", "answers", "prompts", "text"] = "rollouts"
    """What follows the calibration prompts: the teacher's own verified completions, the task's
    answers, or nothing (prompts); text takes pieces of calibration.text_path instead."""
    temperature: float = Field(1.0, ge=0)
    """Of the teacher's completions; 0 is greedy."""
    text_path: Name | None = None
    """Text file, or JSON lines with a column text."""
    seq_len: int = Field(512, ge=2)
    """Tokens in a piece of text; task.num_calibration pieces are drawn."""
    batch_size: int = Field(64, ge=1)
    """Rows in one calibration forward pass."""


class ScoreParts(_Section):
    """What the score of method mama is made of; at least one of them."""

    magnitude: bool = True
    """Absolute value of the weight."""
    activation: bool = True
    """Norm of the weight's input activation over the calibration tokens."""
    movement: bool = True
    """Movement |g*w| from calibration gradients, summed over sequences."""


class PruneConfig(_Section):
    """One-shot pruning: the mask and the weights that training starts from."""

    method: Literal[
        "magnitude",
        "wanda",
        "sparsegpt",
        "alps",
        "mama",
        "sdmprune",
        "block_entropy",
        "random",
        "negative_magnitude",
    ] = "mama"
    """Picks the weights to prune; sdmprune cuts MLP channels, block_entropy drops whole attention
    or MLP blocks, the last two are controls."""
    sparsity: float = Field(0.9, ge=0, lt=1)
    """Target of the whole run: fraction of zeros among the prunable weights."""
    scope: Annotated[str, AfterValidator(_scope)] | None = None
    """Reach the fraction in each matrix, over the model as a whole, in each row, or by N:M, which
    keeps N of every M inputs of a row (2:4); null is row for wanda, matrix for the others."""
    redistribution: Literal["none", "proportional", "least_squares", "admm"] = "least_squares"
    """How what the pruned weights contributed is moved onto kept weights of the same layer; admm
    chooses the mask anew while it moves. Under none sparsegpt and alps keep their own weights,
    under least_squares only their mask."""
    allocation: Literal["uniform", "owl", "search"] = "uniform"
    """Rate of each matrix: the same for all, less where activations have outliers (owl), or
    searched for the lowest KL to the dense model on the calibration rows."""
    search_evaluations: int = Field(64, ge=1)
    """Budget of allocation search, in passes over the calibration rows."""
    width_multiple: int = Field(32, ge=1)
    """The MLP width that sdmprune leaves is a multiple of this."""
    score_parts: ScoreParts = ScoreParts()
    """Parts of the mama score, for ablations."""


class DistillConfig(_TrlSection):
    """Recovery on the teacher's completions before RL. Takes any key of trl.SFTConfig too."""

    rollouts: int = Field(8192, ge=1)
    """Teacher completions, sampled once and cached in the run folder."""
    rollout_temperature: float = Field(1.0, ge=0)
    """Sampling temperature of the teacher; 0 is greedy."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of KL(teacher || student), in nats per completion token."""
    ce_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy on the completion's tokens, in nats per token."""
    muon_learning_rate: float | None = Field(None, gt=0)
    """Trains the prunable matrices with Muon at this rate; null trains all with distill.optim."""


class OnPolicyConfig(_TrlSection):
    """Distillation on the student's own completions. Takes any key of trl.DistillationConfig."""


class GrpoConfig(_TrlSection):
    """Reinforcement learning on verified answers. Takes any key of trl.GRPOConfig too."""

    on_trouble: Literal["go_on", "stop"] = "go_on"
    """At NaN, dead batches, reward collapse or length blow-up: warn and go on, or stop the run with
    its checkpoints kept. Three steps in a row without a finite gradient stop it either way."""
    num_masks: Literal[1, 2] = 1
    """Masks that a group is sampled under: the present one, or half of the completions under the
    sparser one that refinement is heading for, where rewards.sparsity_weight acts."""


class RewardsConfig(_Section):
    """What GRPO rewards."""

    functions: list[Annotated[str, _known_or_dotted(REWARDS)]] = Field(
        ["correctness"], min_length=1
    )
    """Rewards per completion: correctness, format, or your own functions as my.module:function."""
    weights: list[float] | None = None
    """One factor per function; null is 1 for each."""
    format_pattern: Name | None = None
    r"""Regular expression that format searches in each completion; \A and \Z tie it to the ends."""
    teacher_kl_weight: float = Field(0.0, ge=0)
    """Weight of the KL to the teacher; 0 leaves the teacher out."""
    teacher_kl_place: Literal["advantage", "reward", "loss"] = "advantage"
    """Where it acts: -(log p_student - log p_teacher) on each token's advantage, its mean over the
    completion as a reward, or the KL over the vocabulary in the loss."""
    teacher_kl_clip: float = Field(5.0, gt=0)
    """Largest absolute value of that log ratio, in nats per token; not used in the loss."""
    teacher_kl_direction: Literal["forward", "reverse"] = "forward"
    """In the loss: KL(teacher || student), or KL(student || teacher)."""
    teacher_kl_top_k: int | None = Field(None, ge=1)
    """In the loss: how many of the teacher's largest probabilities count singly; null is all."""
    sparsity_weight: float = Field(0.0, ge=0)
    """Bonus per unit of sparsity for a right answer; acts in the choice between candidate masks
    (refine.verify) and in groups sampled under two masks (grpo.num_masks: 2)."""


class MovementConfig(_Section):
    """The record of what training does to each weight."""

    kept: Literal["gradient", "squared", "displacement"] = "gradient"
    """Of kept weights: -g*w, (g*w)^2, or how far the step moved the weight away from zero."""
    pruned: Literal["proposed", "negative_gradient"] = "proposed"
    """Of pruned weights: the update the optimizer proposes / learning rate, or -g."""
    half_life_steps: float = Field(100.0, gt=0)
    """Optimizer steps after which an old step counts half."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the record in memory: 4 bytes a weight, or 2, rounded stochastically."""


class RefineConfig(_Section):
    """How the mask changes while the student trains."""

    start_sparsity: float | None = Field(None, ge=0, lt=1)
    """Fraction of zeros training starts with; null is prune.sparsity, 0 is dense."""
    stages: Annotated[list[Literal["distill", "on_policy", "grpo"]], AfterValidator(_in_order)] = [
        "distill",
        "grpo",
    ]
    """Stages in which the mask is refined; steps count across them. Name on_policy too where it
    should not keep the mask it finds."""
    begin_step: int = Field(0, ge=0)
    """Optimizer step of the first refinement."""
    end_step: int | None = Field(None, ge=1)
    """Step that reaches prune.sparsity; null is 60 % of the steps of refine.stages."""
    every_steps: int = Field(10, ge=1)
    """Optimizer steps between two refinements."""
    scope: Literal["matrix", "model", "row"] = "matrix"
    """Reach the fraction in each weight matrix, over the model as a whole, or in each row."""
    regrow_fraction: float = Field(0.0, ge=0, lt=1)
    """Weights brought back at the first refinement / weights kept then; falls to 0 by a cosine."""
    score: Literal["magnitude", "movement", "fisher", "mix"] = "magnitude"
    """What ranks the kept weights; the lowest are pruned."""
    movement_weight: float = Field(0.5, ge=0, le=1)
    """Share of the movement's rank in score mix; the magnitude's rank has the rest."""
    protect_steps: int = Field(20, ge=0)
    """Optimizer steps during which a weight that was brought back is not pruned."""
    min_density: float = Field(0.01, ge=0, le=1)
    """Fraction of its weights that each matrix keeps under scope model."""
    verify: bool = False
    """Let candidate masks answer the task.num_probe probe prompts, keep the best by its reward, and
    wait where none is good enough; costs 3 rounds of answers and 5 forward passes each time."""
    tolerance: float = Field(0.02, ge=0, lt=1)
    """Under verify: fraction of the probe prompts whose answers a new mask may lose; a larger loss
    refuses it once the paired 95 % interval shows it (a point takes about 2,000 prompts)."""


class LoraConfig(_Section):
    """Adapters in the place of full training, on every prunable projection; merged when saved."""

    r: int | None = Field(None, ge=1)
    """Rank of the adapters; null trains all weights."""
    alpha: float = Field(16.0, gt=0)
    """The adapters' product counts alpha / r."""


class EvaluateConfig(_Section):
    """The measurement at the end, and the small one while a stage trains."""

    every_steps: int | None = Field(None, ge=1)
    """Optimizer steps between two measurements of the greedy accuracy on the probe prompts; the
    stage then leaves its best student at prune.sparsity, not its last. Null measures at the end
    of the run only."""
    patience: int | None = Field(None, ge=1)
    """Such measurements without a better one, under its last mask, that end a training stage early;
    null never does. The learning rate is then still where its schedule had brought it."""
    batch_size: int = Field(250, ge=1)
    """Prompts answered at once."""
    num_samples: int = Field(8, ge=0)
    """Completions shown in the report."""
    max_new_tokens: int = Field(16, ge=1)
    """Longest completion, in tokens."""
    completions: Literal["teacher", "answers"] = "teacher"
    """Text of perplexity and KL: the teacher's greedy completions of the held-out prompts, or the
    task's answers to them."""
    text_path: Name | None = None
    """Text for a perplexity out of the task's domain: a text file, JSON lines, a dataset folder or
    a Hub id such as Salesforce/wikitext, with a column text."""
    text_subset: Name | None = None
    """Name of the Hub dataset's configuration, for example wikitext-2-raw-v1."""
    text_split: Name | None = None
    """Split of a folder or Hub dataset; null is test."""
    text_seq_len: int = Field(512, ge=2)
    """Tokens the model sees at once there. Published figures: 2048, of Llama-2 also 4096."""
    text_stride: int = Field(256, ge=1)
    """Tokens scored of each such window, the others are context; with text_seq_len, as published,
    windows stand side by side."""
    sampled_completions: int | None = Field(None, ge=1)
    """Completions sampled for each held-out prompt, for pass@k; null samples none."""
    pass_at_k: list[Annotated[int, Field(ge=1)]] = Field([1], min_length=1)
    """Values of k, at most sampled_completions: chance that one of k sampled answers is right."""
    temperature: float = Field(1.0, gt=0)
    """Of those completions."""
    zero_shot: list[Name] = []
    """Tasks of lm-evaluation-harness (extra eval); [] leaves them out."""
    num_fewshot: int = Field(0, ge=0)
    """Solved examples in the prompt of those tasks. Published figures have 5 for MMLU, 25 for ARC,
    10 for HellaSwag. A task whose own file says 0 keeps 0."""
    zero_shot_path: Name | None = None
    """Folder with task files (YAML) of your own for it."""
    zero_shot_batch_size: int = Field(4, ge=1)
    """Its requests in one forward pass; their logits are held whole, so mind the vocabulary."""


class ExportConfig(_Section):
    """The final student as other software loads it; read by the stage export."""

    formats: list[Literal["hf", "packed", "csr", "semi_structured", "narrow"]] = Field(
        ["hf", "packed"], min_length=1
    )
    """hf: an ordinary Hugging Face folder with zeros; packed: a mask bit per prunable weight and
    the kept values, for pipeline.export.packed.load; csr: the same file, with a loader whose sparse
    products decode faster on a CPU; semi_structured: the same for 2:4 masks on a GPU; narrow: an
    ordinary folder without the MLP channels and heads that the mask has emptied. Each is loaded
    again and compared."""
    dtype: Dtype | None = None
    """Type of the exported weights; null is student.dtype."""
    push_to_hub: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")] | None = None
    """Hub id, OWNER/NAME, that the format hf is uploaded to, private where it is new; needs
    HF_TOKEN. Null uploads nothing."""


class SweepConfig(_Section):
    """Many one-shot students side by side: rows x levels x seeds."""

    rows: dict[Name, dict[str, Any]] = {}
    """Label of a row to keys of section prune that differ from the config's own."""
    levels: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.5, 0.7, 0.9], min_length=1)
    """Values of prune.sparsity; an N:M row has only its own."""
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field([42, 1, 2], min_length=1)
    """Values of run.seed: other calibration rows, other training data, the same test rows."""
    recover_levels: list[float] = []
    """Levels at which each student is trained too, by section distill with its mask fixed."""
    headline: Name | None = None
    """Row that all others are compared with; null is the first."""


class Config(_Section):
    """Everything a run can be told."""

    run: RunConfig = RunConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    task: TaskConfig = TaskConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    prune: PruneConfig = PruneConfig()
    distill: DistillConfig = DistillConfig()
    on_policy: OnPolicyConfig = OnPolicyConfig()
    grpo: GrpoConfig = GrpoConfig()
    rewards: RewardsConfig = RewardsConfig()
    movement: MovementConfig = MovementConfig()
    refine: RefineConfig = RefineConfig()
    lora: LoraConfig = LoraConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    sweep: SweepConfig = SweepConfig()

    @property
    def moves_mask(self) -> bool:
        """Whether refinement, in the stages that refine, changes the mask that pruning left."""
        refine = self.refine
        return (
            refine.start_sparsity not in (None, self.prune.sparsity)
            or refine.regrow_fraction > 0
            or refine.score != "magnitude"
        )


def sweep_row(config: Config, label: str, sparsity: float | None = None) -> PruneConfig:
    """The section `prune` of one row of a sweep.

    Args:
        config: Gives what the row leaves open.
        label: The row's.
        sparsity: Instead of `prune.sparsity`.

    Raises:
        pydantic.ValidationError: The row has an unknown key or a wrong value.
    """
    values = config.prune.model_dump() | config.sweep.rows[label]
    return PruneConfig(**values if sparsity is None else values | {"sparsity": sparsity})


def sweep_levels(config: Config, label: str) -> list[float]:
    """The levels of a row of a sweep: all of `sweep.levels`, of N:M its own if it is among them."""
    scope = sweep_row(config, label).scope or ""
    if ":" not in scope:
        return config.sweep.levels
    kept, length = map(int, scope.split(":"))
    return [level for level in config.sweep.levels if abs(level - (1 - kept / length)) < 1e-6]
