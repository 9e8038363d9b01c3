"""Pictures of the outcome: each model's accuracy and perplexity, each matrix's sparsity.

Every function takes plain data and returns one picture, whose title is made from the data.
"""

import math
import re
from collections.abc import Collection, Mapping

from pipeline.evaluation.figures import (
    BLUE,
    CELL_DARK,
    CELL_LIGHT,
    GREY,
    ORANGE,
    SKY,
    Picture,
    finish,
    new_figure,
    percent_axis,
    plain_numbers,
)
from pipeline.evaluation.formats import percent, perplexity_text
from pipeline.evaluation.intervals import Interval

MODEL_COLOURS = {
    "teacher": GREY,
    "dense": GREY,
    "pruned": ORANGE,
    "distilled": SKY,
    "on_policy": SKY,
    "student": BLUE,
}
MAX_ANNOTATED_CELLS = 112


def plot_accuracy(
    accuracy: Mapping[str, float],
    ci95: Mapping[str, Interval],
    *,
    num_prompts: int,
    sparsity: float,
) -> Picture:
    """Greedy accuracy of each model, with its interval.

    Args:
        accuracy: Model name to accuracy in [0, 1], in the order to draw.
        ci95: Model name to 95 % interval.
        num_prompts: Held-out prompts behind each number.
        sparsity: Measured sparsity of the last model.
    """
    last = list(accuracy)[-1]
    title = (
        f"At {percent(sparsity)} sparsity the {last} model is right on {percent(accuracy[last])} "
        "of the prompts"
    )
    if last != "dense" and "dense" in accuracy:
        title += f", the dense model on {percent(accuracy['dense'])}"
    figure, (axes,) = new_figure(title, 0.45 * len(accuracy) + 1.5)
    for name, value in accuracy.items():
        low, high = ci95[name]
        axes.barh(
            name,
            value,
            xerr=[[value - low], [high - value]],
            height=0.6,
            capsize=3,
            color=MODEL_COLOURS[name],
        )
        axes.annotate(percent(value), (high, name), (6, 0), textcoords="offset points", va="center")
    axes.set_xlim(0, 1.12)
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.xaxis.set_major_formatter(percent_axis())
    axes.set_xlabel(f"greedy accuracy on {num_prompts:,} held-out prompts (bar: 95 % interval)")
    axes.invert_yaxis()
    return finish(figure, title)


def plot_perplexity(perplexity: Mapping[str, float | None], *, on: str) -> Picture:
    """Perplexity of each model, on a logarithmic axis where it spans more than a factor of 10.

    Args:
        perplexity: Model name to perplexity, in the order to draw; None is left out. At least one.
        on: The text it was taken on.
    """
    perplexity = {name: value for name, value in perplexity.items() if value is not None}
    last = list(perplexity)[-1]
    title = f"The {last} model has a perplexity of {perplexity_text(perplexity[last])}"
    if last != "dense" and "dense" in perplexity:
        title += f", the dense model {perplexity_text(perplexity['dense'])}"
    figure, (axes,) = new_figure(title, 0.45 * len(perplexity) + 1.5)
    for name, value in perplexity.items():
        axes.plot(value, name, "o", color=MODEL_COLOURS[name], markersize=10)
        text = perplexity_text(value)
        axes.annotate(text, (value, name), (10, 0), textcoords="offset points", va="center")
    low, high = min(perplexity.values()), max(perplexity.values())
    is_log = high > 10 * low
    if is_log:
        margin = (high / low) ** 0.12
        axes.set(xscale="log", xlim=(low / margin, high * margin))
        plain_numbers(axes.xaxis)
    else:
        axes.margins(x=0.12)
    scale = "log scale, lower is better" if is_log else "lower is better"
    axes.set_xlabel(f"perplexity per token ({scale})\nof {on}")
    axes.margins(y=0.12)
    axes.grid(axis="y", alpha=0.3)
    axes.invert_yaxis()
    return finish(figure, title)


def plot_layer_sparsity(per_layer: Mapping[str, float]) -> Picture:
    """Sparsity of every prunable matrix: decoder layers down, matrices across.

    Args:
        per_layer: Weight name (`model.layers.0.self_attn.q_proj.weight`) to fraction of zeros.
    """
    cells = {_layer_and_matrix(name): value for name, value in per_layer.items()}
    matrices = list(dict.fromkeys(matrix for _, matrix in cells))
    layers = sorted({layer for layer, _ in cells})
    table = [[cells.get((layer, matrix), math.nan) for matrix in matrices] for layer in layers]
    title = _layer_sparsity_title(cells)
    is_annotated = len(cells) <= MAX_ANNOTATED_CELLS
    figure, (axes,) = new_figure(title, (0.32 if is_annotated else 0.2) * len(layers) + 1.9)
    low, high = _colour_range(cells.values())
    image = axes.imshow(table, aspect="auto", cmap="cividis", vmin=low, vmax=high)
    axes.set_xticks(range(len(matrices)), [name.removesuffix("_proj") for name in matrices])
    axes.set_yticks(range(len(layers)), layers)
    axes.set_xlabel("matrix")
    axes.set_ylabel("decoder layer")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="zeros in the matrix", format=percent_axis())
    if is_annotated:
        for (layer, matrix), value in cells.items():
            colour = CELL_LIGHT if value < (low + high) / 2 else CELL_DARK
            where = matrices.index(matrix), layers.index(layer)
            axes.text(
                *where, f"{100 * value:.1f}", ha="center", va="center", color=colour, fontsize=8
            )
    return finish(figure, title)


def _colour_range(values: Collection[float]) -> tuple[float, float]:
    """Bounds at multiples of 5 %, within [0, 1], also around values that hardly differ."""
    low, high = math.floor(20 * min(values)) / 20, math.ceil(20 * max(values)) / 20
    if high - low < 0.1:
        low, high = max(0.0, low - 0.05), min(1.0, high + 0.05)
    return low, high


def _layer_and_matrix(name: str) -> tuple[int, str]:
    """`model.layers.3.mlp.up_proj.weight` to (3, `up_proj`)."""
    layer, matrix = re.search(r"layers\.(\d+)\..*?(\w+)\.weight$", name).groups()
    return int(layer), matrix


def _layer_sparsity_title(cells: Mapping[tuple[int, str], float]) -> str:
    (low_layer, low_matrix), (high_layer, high_matrix) = (
        min(cells, key=cells.get),
        max(cells, key=cells.get),
    )
    low, high = min(cells.values()), max(cells.values())
    if percent(low) == percent(high):
        return f"Every one of the {len(cells)} prunable matrices has {percent(low)} zeros"
    return (
        f"Zeros reach from {percent(low)} ({low_matrix} of layer {low_layer}) "
        f"to {percent(high)} ({high_matrix} of layer {high_layer})"
    )
