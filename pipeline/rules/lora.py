"""Rules on adapters."""

from collections.abc import Iterator

from pipeline.config import Config
from pipeline.rules.fault import Fault


def lora_faults(config: Config) -> Iterator[Fault]:
    """An adapter has no gradient and no moments for each weight, and no whole matrix to step."""
    if config.lora.r is None:
        return
    levels = config.sweep.recover_levels if "sweep" in config.run.stages else []
    for key, value, accepted, why, remedy in (
        (
            "movement.kept",
            config.movement.kept,
            ("displacement",),
            "no weight of an adapter's product has a gradient of its own",
            "set displacement",
        ),
        (
            "movement.pruned",
            config.movement.pruned,
            ("proposed",),
            "no weight of an adapter's product has a gradient of its own",
            "set proposed",
        ),
        (
            "refine.score",
            config.refine.score,
            ("magnitude", "movement", "mix"),
            "no weight of an adapter's product has a second moment of its own",
            "set magnitude",
        ),
        (
            "distill.muon_learning_rate",
            config.distill.muon_learning_rate,
            (None,),
            "with adapters no whole matrix is trained, which it could orthogonalise",
            "set null",
        ),
        (
            "grpo.use_vllm",
            config.grpo.trl_values.get("use_vllm", False),
            (False,),
            "TRL merges adapters for vLLM without their mask",
            "set false",
        ),
        (
            "grpo.num_masks",
            config.grpo.num_masks,
            (1,),
            "the next mask is tried on the optimizer's weights, where no adapter's product is",
            "set 1",
        ),
        (
            "refine.verify",
            config.refine.verify,
            (False,),
            "candidate masks are tried on the optimizer's weights, where no adapter's product is",
            "set false",
        ),
        (
            "run.stages",
            [stage for stage in config.run.stages if stage == "on_policy"],
            ([],),
            "on_policy trains its student whole",
            "leave on_policy out",
        ),
        (
            "sweep.recover_levels",
            levels,
            ([],),
            "a sweep trains its students whole",
            "set []",
        ),
    ):
        if value not in accepted:
            yield Fault(key, value, why, f"{remedy}, or lora.r: null, instead", ("lora.r",))
