"""Which one-shot methods go with which scope, redistribution and allocation."""

from collections.abc import Iterator

SOLVERS = ("sparsegpt", "alps")
"""Methods that find masks and weights together, within a matrix."""
STRUCTURED = ("sdmprune", "block_entropy")
"""Methods that choose whole channels or blocks over the model."""


ADMM_METHODS = ("magnitude", "wanda", "mama")
"""Methods whose score is |w| times something, which ADMM can compare by."""


def contradictions(
    method: str, scope: str | None, redistribution: str, allocation: str
) -> Iterator[tuple[str, str, str, str]]:
    """What contradicts the method or the scope.

    Args:
        method: `prune.method`.
        scope: `prune.scope`; None is the method's default.
        redistribution: `prune.redistribution`.
        allocation: `prune.allocation`.

    Yields:
        Key without `prune.`, its value, what is wrong with it, and what to set instead.
    """
    if method in SOLVERS and scope == "model":
        yield (
            "scope",
            "model",
            f"{method}'s scores mean something within a matrix only",
            "set matrix, row or N:M instead",
        )
    if method in SOLVERS and redistribution == "proportional":
        yield (
            "redistribution",
            "proportional",
            f"{method} moves pruned weights itself",
            "set none, or least_squares on its mask, instead",
        )
    if redistribution == "admm" and method not in ADMM_METHODS:
        yield (
            "redistribution",
            "admm",
            f"it compares by |w| times the rest of a score, and {method} has none such",
            "set least_squares or none instead",
        )
    elif redistribution == "admm" and scope == "model":
        yield (
            "redistribution",
            "admm",
            "it chooses within a matrix, and prune.scope is model",
            "set least_squares, or another prune.scope, instead",
        )
    if method in STRUCTURED and scope not in (None, "model"):
        yield (
            "scope",
            scope,
            f"{method} chooses over the whole model",
            "set null instead",
        )
    if allocation == "uniform":
        return
    if method in STRUCTURED or scope == "model":
        yield (
            "allocation",
            allocation,
            f"{method} under scope model shares out the zeros itself",
            "set uniform instead",
        )
    elif scope is not None and ":" in scope:
        yield (
            "allocation",
            allocation,
            f"prune.scope {scope} has one rate for every matrix",
            "set uniform instead",
        )
