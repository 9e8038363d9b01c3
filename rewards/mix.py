"""The reward mix: r = sum_k w_k r_k over the reward functions that the config names.

Each r_k gives one value per completion. TRL forms the sum and subtracts the mean of the group, so
only differences between completions of one prompt act; a term that is the same for all of them has
no effect, whatever its weight. The per-token teacher term is not one of them: it is added after the
group's normalisation (`rewards.teacher_kl`).
"""

from collections.abc import Callable

from rewards.correctness import Correctness, Verifier
from rewards.dotted import load_function
from rewards.format import Format


def build_rewards(
    names: list[str],
    weights: list[float] | None,
    verifier: Verifier,
    format_pattern: str | None = None,
) -> tuple[list[Callable], list[float]]:
    """Build TRL's reward functions and their weights.

    Args:
        names: `correctness`, `format`, or `my.module:fn` with TRL's signature
            (prompts, completions, **columns) -> one float, or None, per completion.
        weights: One weight per name; None for 1.0 each.
        verifier: What `correctness` asks.
        format_pattern: The regular expression of `format`, which needs one.

    Returns:
        TRL's `reward_funcs` and `reward_weights`.

    Raises:
        ValueError: A name is none of these, or `format` has no pattern; the message starts with
            the name. Or the pattern is no regular expression; it starts with the pattern.
    """
    assert weights is None or len(weights) == len(names)
    functions = [_build(name, verifier, format_pattern) for name in names]
    return functions, [1.0] * len(names) if weights is None else list(weights)


def _build(name: str, verifier: Verifier, format_pattern: str | None) -> Callable:
    if name == "correctness":
        return Correctness(verifier)
    if name == "format":
        if format_pattern is None:
            raise ValueError("'format' needs a regular expression.")
        return Format(format_pattern)
    return load_function(name)
