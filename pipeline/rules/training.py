"""Rules on what is trained, on which text, and what the sparsity engine needs for it."""

from collections.abc import Iterator

from pipeline.config import TRAINING_STAGES, Config
from pipeline.rules.fault import Fault


def training_faults(config: Config) -> Iterator[Fault]:
    """Master weights, number of steps, number of rewards, a loss that is not 0."""
    trained = [stage for stage in config.run.stages if stage in TRAINING_STAGES]
    for stage in trained:
        steps = getattr(config, stage).trl_values.get("max_steps")
        if stage in config.refine.stages and (steps is None or steps < 1):
            yield Fault(
                f"{stage}.max_steps",
                steps,
                f"refinement counts the optimizer steps of {stage} beforehand",
                "set 1 or more instead",
                ("run.stages", "refine.stages"),
            )
    if config.student.dtype == "bfloat16" and trained:
        yield Fault(
            "student.dtype",
            "bfloat16",
            f"{trained[0]} would train without fp32 master weights, and bfloat16 rounds the small "
            "updates of RL away",
            "set float32, and grpo.bf16: true for bfloat16 autocast, instead",
            ("run.stages",),
        )
    weights, functions = config.rewards.weights, config.rewards.functions
    if weights is not None and len(weights) != len(functions):
        yield Fault(
            "rewards.weights",
            weights,
            f"{len(weights)} numbers for {len(functions)} rewards.functions",
            f"set {len(functions)} of them, or null, instead",
            ("rewards.functions",),
        )
    if config.distill.kl_weight == config.distill.ce_weight == 0:
        yield Fault(
            "distill.kl_weight",
            0,
            "with distill.ce_weight 0 too the loss is always 0",
            "set one of the two above 0 instead",
            ("distill.ce_weight",),
        )


def heldout_faults(config: Config) -> Iterator[Fault]:
    """Patience counts measurements."""
    values = config.evaluate
    if values.patience is not None and values.every_steps is None:
        yield Fault(
            "evaluate.patience",
            values.patience,
            "counts measurements, and evaluate.every_steps is null",
            "set evaluate.every_steps to a number of steps such as 50, or this to null",
            ("evaluate.every_steps",),
        )


def text_faults(config: Config) -> Iterator[Fault]:
    """What reading plain text needs."""
    if config.calibration.source == "text" and config.calibration.text_path is None:
        yield Fault(
            "calibration.text_path",
            None,
            "calibration.source is text",
            "set a text file, or another calibration.source, instead",
            ("calibration.source",),
        )
    if config.evaluate.text_stride > config.evaluate.text_seq_len:
        yield Fault(
            "evaluate.text_stride",
            config.evaluate.text_stride,
            "would leave tokens out between windows of evaluate.text_seq_len, "
            f"{config.evaluate.text_seq_len}",
            f"set {config.evaluate.text_seq_len} or less instead",
            ("evaluate.text_seq_len",),
        )


def sampling_faults(config: Config) -> Iterator[Fault]:
    """pass@k needs k answers."""
    values = config.evaluate
    too_many = [k for k in values.pass_at_k if k > (values.sampled_completions or k)]
    if too_many:
        yield Fault(
            "evaluate.pass_at_k",
            values.pass_at_k,
            f"pass@{too_many[0]} needs as many of evaluate.sampled_completions, "
            f"{values.sampled_completions}",
            f"set {values.sampled_completions} or less, or sample more, instead",
            ("evaluate.sampled_completions",),
        )


def engine_faults(config: Config) -> Iterator[Fault]:
    """What movement and scores need from each other and from the optimizer."""
    if config.movement.kept == "displacement" and config.movement.dtype == "bfloat16":
        yield Fault(
            "movement.dtype",
            "bfloat16",
            "movement.kept displacement is a difference of two magnitudes, of which bfloat16 keeps "
            "nothing",
            "set float32, or movement.kept: gradient, instead",
            ("movement.kept",),
        )
    if config.refine.score == "fisher" and config.distill.muon_learning_rate is not None:
        yield Fault(
            "refine.score",
            "fisher",
            "needs Adam's second moment, which distill.muon_learning_rate leaves out",
            "set movement, with movement.kept: squared, which is the same without it, or "
            "distill.muon_learning_rate: null, instead",
            ("distill.muon_learning_rate",),
        )
    if (
        config.movement.pruned == "proposed"
        and config.refine.regrow_fraction > 0
        and config.distill.muon_learning_rate is not None
    ):
        yield Fault(
            "movement.pruned",
            "proposed",
            "says nothing under distill.muon_learning_rate: Muon gets gradients of kept weights "
            "alone, and by this movement weights would be brought back",
            "set negative_gradient, or refine.regrow_fraction: 0, instead",
            ("refine.regrow_fraction", "distill.muon_learning_rate"),
        )
