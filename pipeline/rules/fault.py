"""What is wrong with a configuration, key by key."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Fault:
    """One thing to mend."""

    key: str
    """Dotted key, for example `prune.sparsity`."""
    value: Any
    """What was given."""
    why: str
    """What is wrong with it."""
    remedy: str
    """What to do, as a phrase: `set run.seed instead`."""
    also: tuple[str, ...] = ()
    """Other dotted keys that the rule reads, or that an unknown key may have meant."""
