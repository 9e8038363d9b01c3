"""The engine suite: what masks and movement cost, shape by shape, and whether the goals are met.

Ratios are taken within one run. Shapes that ask for an accelerator are labelled "not run" where
there is none. Ranks beyond the cores are labelled oversubscribed; nothing is timed on them.
"""

import os
from pathlib import Path

import torch

from launch.benchmarks.bandwidth import bandwidth
from launch.benchmarks.communication import NUM_RANKS, communication
from launch.benchmarks.optimizer_step import GOAL, optimizer_step
from launch.benchmarks.refinement import GOAL_PASSES, refinement
from launch.benchmarks.shapes import Shape, load_shapes
from launch.benchmarks.state_bytes import MASK_GOAL, state_bytes
from launch.benchmarks.training_step import training_step
from launch.benchmarks.workbench import SPARSITY, build_workbench

NUM_ROUNDS = 7
NUM_TRAINING_ROUNDS = 3


def run(config: Path) -> dict:
    """Measures every shape of a YAML file.

    Raises:
        UserError: The file is at fault.
    """
    shapes = load_shapes(config)
    speeds: dict[str, dict] = {}
    measured = {}
    for name, shape in shapes.shapes.items():
        if shape.device == "cuda" and not torch.cuda.is_available():
            measured[name] = {"not_run": "no CUDA device"}
            continue
        if shape.device not in speeds:
            speeds[shape.device] = bandwidth(torch.device(shape.device), NUM_ROUNDS)
        measured[name] = measure(shape, speeds[shape.device]["update"]["median"])
        print(f"{name}: measured", flush=True)
    sent = communication(shapes.communication)
    return {
        "sparsity": SPARSITY,
        "num_rounds": NUM_ROUNDS,
        "bytes_per_second": speeds,
        "shapes": measured,
        "communication": {
            "num_ranks": NUM_RANKS,
            "oversubscribed": len(os.sched_getaffinity(0)) < NUM_RANKS,
            "refinements": sent,
        },
        "goals": [*goals(shapes.shapes, measured), *communication_goals(sent)],
    }


def measure(shape: Shape, update_bytes_per_second: float) -> dict:
    """Everything that is timed on one shape."""
    bench = build_workbench(shape)
    step = optimizer_step(bench, update_bytes_per_second, NUM_ROUNDS)
    refined, state = refinement(bench, NUM_ROUNDS)
    found = {
        "device": shape.device,
        "num_prunable_weights": bench.num_weights,
        "optimizer_step": step,
        "state_bytes_per_weight": state_bytes(bench, state),
        "refinement": refined,
    }
    del bench, state
    if shape.batch_size is not None:
        seconds = refined["scopes"]["matrix"]["seconds"]["median"]
        found["training_step"] = training_step(shape, seconds, NUM_TRAINING_ROUNDS)
    return found


def goals(shapes: dict[str, Shape], measured: dict[str, dict]) -> list[dict]:
    """One row for each goal and shape that was run."""
    rows = []

    def row(shape: str, what: str, value: float, goal: float) -> None:
        rows.append(
            {"shape": shape, "what": what, "measured": value, "goal": goal, "met": value <= goal}
        )

    for name, found in measured.items():
        if "not_run" in found:
            continue
        for rule, step in found["optimizer_step"]["rules"].items():
            row(name, f"step / fused AdamW: {rule}", step["ratio"]["median"], GOAL)
        held = found["state_bytes_per_weight"]
        row(name, "bytes per weight, float32", held["float32"], 4 + MASK_GOAL)
        row(name, "bytes per weight, bfloat16", held["bfloat16"], 2 + MASK_GOAL)
        for scope, refined in found["refinement"]["scopes"].items():
            row(name, f"passes of a refinement: {scope}", refined["passes"]["median"], GOAL_PASSES)
        if shapes[name].share_goal is not None:
            share = found["training_step"]["share"]
            row(name, "share of a training step", share, shapes[name].share_goal)
    return rows


def communication_goals(sent: list[dict]) -> list[dict]:
    """No refinement sends more than what follows from the number of matrices alone."""
    return [
        {
            "shape": found["shape"],
            "what": f"bytes sent: {found['scope']}{', tied' if found['tied'] else ''}",
            "measured": found["bytes"],
            "goal": found["most_bytes"],
            "met": found["bytes"] <= found["most_bytes"],
        }
        for found in sent
    ]


def show(result: dict) -> None:
    """Prints the goals and the bytes sent."""
    for row in result["goals"]:
        verdict = "met" if row["met"] else "MISSED"
        print(
            f"{row['shape']:9} {row['what']:58} {row['measured']:12,.6g} "
            f"(goal {row['goal']:,.6g}) {verdict}"
        )
    for name, found in result["shapes"].items():
        if "not_run" in found:
            print(f"{name:9} not run: {found['not_run']}")
    for sent in result["communication"]["refinements"]:
        ties = ", tied" if sent["tied"] else ""
        print(
            f"refinement of {sent['shape']} ({sent['num_weights']:,} weights in "
            f"{sent['num_matrices']} matrices), scope {sent['scope']}{ties}: {sent['bytes']:,} "
            f"bytes in {sent['collectives']} collectives"
        )
