"""The score of every method that ranks weights, by the method's name. High = keep."""

from torch import Tensor

from pipeline.pruning.magnitude import magnitude_score, negative_magnitude_score, random_score
from pipeline.pruning.mama import mama_scores
from pipeline.pruning.wanda import wanda_score

CRITERIA = ("magnitude", "wanda", "mama", "random", "negative_magnitude")


def criterion_scores(
    method: str,
    weights: dict[str, Tensor],
    input_norms: dict[str, Tensor] | None,
    movement: dict[str, Tensor] | None,
    seed: int,
    magnitude: bool = True,
) -> dict[str, Tensor]:
    """Scores of weights that compete with each other.

    Args:
        method: One of `CRITERIA`.
        weights: Name to (out, in) dense weight.
        input_norms: Name to (in,) L2 norms of the input channels, for `wanda` and `mama`; None
            switches activation off in `mama`.
        movement: Name to (out, in) calibration movement, for `mama`; None switches it off.
        seed: Of `random`.
        magnitude: Whether `mama` uses the magnitude.

    Returns:
        Name to (out, in) fp32.
    """
    if method == "mama":
        return mama_scores(weights, input_norms, movement, magnitude)
    if method == "wanda":
        return {name: wanda_score(weight, input_norms[name]) for name, weight in weights.items()}
    if method == "random":
        return {name: random_score(weight, name, seed) for name, weight in weights.items()}
    score = magnitude_score if method == "magnitude" else negative_magnitude_score
    return {name: score(weight) for name, weight in weights.items()}
