"""The prune suite: seconds and memory of every one-shot method on one decoder layer, by shape.

What calibration costs is timed on whole passes over the layer: the forward pass alone, what the
statistics add, movement, what the structured methods choose by (SDMPrune's importance once, of the
two times it takes it), and Wanda from start to end. What a method then does with the statistics is
timed for all seven matrices together; a factor that matrices share is computed once. ALPS and
MAMA with ADMM take turns between mask and weights and are timed at fewer sparsities; of a large
layer only their first steps are, after the eigenpairs.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from launch.benchmarks.peak_memory import PeakMemory
from launch.benchmarks.prune_layer import PRUNERS, SOLVE, LayerBench, LayerShape, LayerShapes
from launch.benchmarks.shapes import load_shapes
from launch.benchmarks.timing import Side, alternate, ratios, seconds, summary

FORWARD, WANDA, SPARSEGPT = "forward pass alone", "wanda, whole", "sparsegpt"
ITERATIVE = ("alps", "mama + admm")


def run(config: Path, save: Callable[[dict], None]) -> dict:
    """Measures every layer of a YAML file.

    Args:
        config: The file.
        save: Gets the result after each layer, so that a long one costs no other when interrupted.

    Raises:
        UserError: The file is at fault.
    """
    shapes = load_shapes(config, LayerShapes)
    result = {"layers": {}, "goals": []}
    measured = result["layers"]
    for name, shape in shapes.layers.items():
        if shape.device == "cuda" and not torch.cuda.is_available():
            measured[name] = {"not_run": "no CUDA device"}
            continue
        measured[name] = measure(shape, shapes)
        result["goals"] = goals(shapes.layers, measured)
        save(result)
        print(f"{name}: measured", flush=True)
    return result


def measure(shape: LayerShape, shapes: LayerShapes) -> dict:
    """Everything that is timed on one layer."""
    bench = LayerBench(shape)
    found = {
        "device": shape.device,
        "num_weights": sum(weight.numel() for weight in bench.dense.values()),
        "num_tokens": shape.batch_size * shape.sequence_length,
        "num_rounds": shape.num_rounds,
        "calibration": timed(
            bench.calibration_sides(shapes.sparsities[0]), bench.device, shape.num_rounds, FORWARD
        ),
        "sparsities": {},
    }
    for sparsity in sorted({*shapes.sparsities, *shapes.iterative_sparsities}):
        sides = pruning_sides(bench, shapes, sparsity, shape.num_admm_steps)
        reference = SPARSEGPT if SPARSEGPT in sides else next(iter(sides))
        found["sparsities"][str(sparsity)] = timed(sides, bench.device, shape.num_rounds, reference)
    return found


def pruning_sides(
    bench: LayerBench, shapes: LayerShapes, sparsity: float, num_admm_steps: int | None
) -> dict[str, Side]:
    """What is timed at one sparsity."""
    names = [*PRUNERS, SOLVE] if sparsity in shapes.sparsities else []
    sides = {n: bench.pruning_side(n, sparsity) for n in names if n not in ITERATIVE}
    if sparsity in shapes.iterative_sparsities:
        if num_admm_steps is None:
            return sides | {n: bench.pruning_side(n, sparsity) for n in ITERATIVE}
        sides |= bench.admm_sides(sparsity, num_admm_steps)
    return sides


def timed(
    sides: dict[str, Side], device: torch.device, num_rounds: int, reference: str
) -> dict[str, dict]:
    """Seconds, ratio to the reference and memory of each side.

    Args:
        sides: Name to side.
        device: Where they work.
        num_rounds: Samples of each; 1 takes each once and nothing before.
        reference: Name of the side that the others are compared with.

    Returns:
        Name to `seconds` and `ratio`, medians with quartiles, and `peak_bytes`, None if unknown.
    """
    taken = alternate(sides, device, num_rounds) if num_rounds > 1 else {}
    peaks = {}
    for name, side in sides.items():
        side.prepare()
        memory = PeakMemory(device)
        memory.start()
        last = seconds(side.run, device)
        peaks[name] = memory.bytes_needed()
        taken.setdefault(name, [last, last])
    return {
        name: {
            "seconds": summary(values),
            "ratio": ratios(values, taken[reference]),
            "peak_bytes": peaks[name],
        }
        for name, values in taken.items()
    }


def goals(shapes: dict[str, LayerShape], measured: dict[str, dict]) -> list[dict]:
    """One row for each goal and layer that was run."""
    rows = []

    def row(layer: str, what: str, value: float, goal: float | None) -> None:
        if goal is not None:
            met = value <= goal
            rows.append({"layer": layer, "what": what, "measured": value, "goal": goal, "met": met})

    for name, found in measured.items():
        if "not_run" in found:
            continue
        wanda = found["calibration"][WANDA]["ratio"]["median"]
        row(name, "Wanda / forward pass alone", wanda, shapes[name].wanda_goal)
        for sparsity, sides in found["sparsities"].items():
            if SOLVE in sides:
                ratio = sides[SOLVE]["ratio"]["median"]
                what = f"least squares / SparseGPT at {sparsity}"
                row(name, what, ratio, shapes[name].least_squares_goal)
    return rows


def show(result: dict) -> None:
    """Prints a table for each layer, then the goals."""
    for name, found in result["layers"].items():
        if "not_run" in found:
            print(f"{name}: not run: {found['not_run']}")
            continue
        print(f"{name}: {found['num_weights']:,} weights, {found['num_tokens']:,} tokens")
        print(f"  {'':9}{'':28}{'seconds':>10}{'ratio':>9}{'peak MiB':>10}")
        for title, sides in {"": found["calibration"], **found["sparsities"]}.items():
            for side, figures in sides.items():
                peak = figures["peak_bytes"]
                print(
                    f"  {title:9}{side:28}{figures['seconds']['median']:10.4g}"
                    f"{figures['ratio']['median']:9.3g}"
                    f"{'unknown' if peak is None else format(peak / 2**20, '.0f'):>10}"
                )
    for row in result["goals"]:
        verdict = "met" if row["met"] else "MISSED"
        print(
            f"{row['layer']:9} {row['what']:40} {row['measured']:8.3g} "
            f"(goal {row['goal']:g}) {verdict}"
        )
