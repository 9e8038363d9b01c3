"""The pictures of a run, from what its stages left on disk; drawn is what there is data for."""

from pathlib import Path

from pipeline.artifacts import MASK_FILE, RunFolder
from pipeline.config import TRAINING_STAGES, Config
from pipeline.evaluation.figures import Picture
from pipeline.evaluation.magnitude_plot import count_pairs, plot_magnitude
from pipeline.evaluation.movement_plot import movement_histogram, plot_movement
from pipeline.evaluation.plots import plot_accuracy, plot_layer_sparsity, plot_perplexity
from pipeline.evaluation.summary import Report
from pipeline.evaluation.training_plots import plot_training
from pipeline.models.loading import load_model
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.masks import load_masks
from pipeline.sparsity.storage import saved_movement
from pipeline.stages.inputs import stage_before
from pipeline.stages.training_logs import training_logs


def draw(config: Config, folder: RunFolder, report: Report) -> dict[str, Picture]:
    """Pictures by path relative to the run folder.

    Args:
        config: Of the run.
        folder: Its stages.
        report: What is known; of an unfinished run, parts of it.
    """
    pictures = {}
    accuracy, sparsity = report.get("accuracy", {}), report.get("sparsity", {})
    models = {name: accuracy[name] for name in accuracy.get("ci95", {})}
    if models and "measured" in sparsity:
        pictures["accuracy"] = plot_accuracy(
            models,
            accuracy["ci95"],
            num_prompts=accuracy["num_prompts"],
            sparsity=sparsity["measured"],
        )
    if "per_layer" in sparsity:
        pictures["layer_sparsity"] = plot_layer_sparsity(sparsity["per_layer"])
    perplexity = {
        name: value
        for name, value in report.get("perplexity", {}).items()
        if name in models and value is not None
    }
    if perplexity:
        pictures["perplexity"] = plot_perplexity(perplexity, on=report["perplexity"]["on"])
    logs = training_logs(folder)
    if any(logs.values()):
        pictures["training"] = plot_training(logs)
    last = stage_before(folder, "evaluate")
    if last in TRAINING_STAGES:
        pictures["movement"] = _movement(config, folder.stage(last))
        start = folder.stage("prune") / MASK_FILE
        if start.exists():
            pictures["magnitude"] = _magnitude(config, folder.stage(last), start)
    return {f"plots/{name}.png": picture for name, picture in pictures.items()}


def _movement(config: Config, source: Path) -> Picture:
    saved = [(mask, movement) for _, _, mask, movement in saved_movement(source)]
    sides = {
        config.movement.kept: [movement[mask].float() for mask, movement in saved],
        config.movement.pruned: [movement[~mask].float() for mask, movement in saved],
    }
    return plot_movement({seen: movement_histogram(tensors) for seen, tensors in sides.items()})


def _magnitude(config: Config, source: Path, start: Path) -> Picture:
    """Against the mask that training started from, each weight is kept, came back or is pruned."""
    values = config.student
    dense = load_model(
        values.path,
        revision=values.revision,
        dtype=values.dtype,
        trust_remote_code=values.trust_remote_code,
    )  # beside the models that are still on the accelerator there may be no room
    weights, first = prunable_weights(dense), load_masks(start)
    counts = {side: count_pairs([]) for side in ("kept", "came back", "pruned")}
    for name, offset, mask, movement in saved_movement(source):
        part = slice(offset, offset + mask.numel())
        sizes = weights[name].detach().reshape(-1)[part]
        before = first[name].reshape(-1)[part]
        for side, chosen in (
            ("kept", mask & before),
            ("came back", mask & ~before),
            ("pruned", ~mask),
        ):
            counts[side] += count_pairs([(sizes[chosen], movement[chosen])])
    return plot_magnitude(counts, kept=config.movement.kept, pruned=config.movement.pruned)
