"""The rules that tie two or more configuration keys together, all of them in order.

Each rule yields a `Fault` that says which keys it read, so that the caller can drop it when one of
those keys is faulty by itself.
"""

from pipeline.config import Config
from pipeline.rules.batches import batch_faults
from pipeline.rules.export import export_faults
from pipeline.rules.fault import Fault
from pipeline.rules.idle_terms import idle_terms
from pipeline.rules.lora import lora_faults
from pipeline.rules.masks import method_faults, pattern_faults, sparsity_faults
from pipeline.rules.rewards import format_faults, teacher_term_faults
from pipeline.rules.sweep import sweep_faults
from pipeline.rules.training import (
    engine_faults,
    heldout_faults,
    sampling_faults,
    text_faults,
    training_faults,
)

RULES = (
    training_faults,
    batch_faults,
    format_faults,
    idle_terms,
    teacher_term_faults,
    sparsity_faults,
    pattern_faults,
    method_faults,
    text_faults,
    heldout_faults,
    sampling_faults,
    sweep_faults,
    engine_faults,
    lora_faults,
    export_faults,
)


def cross_faults(config: Config) -> list[Fault]:
    """Finds what no single key shows.

    Args:
        config: A config whose keys are valid one by one.

    Returns:
        The broken rules; empty when all hold.
    """
    return [fault for rule in RULES for fault in rule(config)]
