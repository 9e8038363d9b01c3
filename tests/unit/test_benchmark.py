"""The benchmarks run on small shapes, count what they say they count, and write whole JSON."""

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import distributed as dist

from launch.benchmarks import engine, quality, step
from launch.benchmarks.clipping import compare
from launch.benchmarks.communication import Communicated, distinct
from launch.benchmarks.optimizer_step import ADAMW_BYTES, RULES, engine_bytes
from launch.benchmarks.peak_memory import PeakMemory
from launch.benchmarks.prune_layer import LayerBench, LayerShape, LayerShapes
from launch.benchmarks.shapes import Shape, load_shapes
from launch.benchmarks.timing import Side, alternate, ratios, summary
from pipeline.config_loading import load_config
from pipeline.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = (
    "{hidden_size: 16, intermediate_size: 32, num_layers: 1, num_heads: 2, "
    "num_key_value_heads: 1, vocab_size: 16, batch_size: 2, sequence_length: 4, share_goal: 0.5}"
)
CONFIG = f"""
shapes:
  small: {TINY}
  large: {{hidden_size: 16, intermediate_size: 32, num_layers: 1, device: cuda}}
communication:
  narrow: {{hidden_size: 32, intermediate_size: 64, num_layers: 1}}
  wide: {{hidden_size: 64, intermediate_size: 128, num_layers: 1}}
"""


def benchmark(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, ROOT / "launch/benchmark.py", *arguments], check=True, timeout=300
    )


@pytest.mark.slow
@pytest.mark.distributed
def test_engine_suite_writes_every_figure(tmp_path, monkeypatch):
    (tmp_path / "shapes.yaml").write_text(CONFIG)
    output = tmp_path / "engine.json"
    benchmark("--suite", "engine", "--config", tmp_path / "shapes.yaml", "--output", output)
    result = json.loads(output.read_text())
    assert {"suite", "date", "hardware", "git_commit", "versions", "goals"} <= result.keys()
    small = result["shapes"]["small"]
    assert small["state_bytes_per_weight"]["float32"] == 4.125
    assert small["state_bytes_per_weight"]["bfloat16"] == 2.125
    assert small["optimizer_step"]["rules"].keys() == RULES.keys()
    assert small["refinement"]["scopes"].keys() == {"matrix", "model"}
    assert small["refinement"]["regrown"] == small["refinement"]["pruned"] > 0
    assert "share" in small["training_step"]
    assert {row["what"] for row in result["goals"] if row["shape"] == "small"} >= {
        "bytes per weight, float32",
        "share of a training step",
    }
    if not torch.cuda.is_available():
        assert result["shapes"]["large"] == {"not_run": "no CUDA device"}
    sent = result["communication"]["refinements"]
    assert len(sent) == 6
    assert all(found["collectives"] > 0 and found["regrown"] > 0 for found in sent)
    tied = {found["shape"]: found for found in sent if found["tied"]}
    assert tied["wide"]["num_weights"] > 3 * tied["narrow"]["num_weights"]
    assert tied["wide"]["bytes"] < 2 * tied["narrow"]["bytes"]
    assert any(row["what"].startswith("bytes sent") for row in result["goals"])


PRUNE_CONFIG = """
sparsities: [0.5]
iterative_sparsities: [0.75]
layers:
  small: {hidden_size: 32, intermediate_size: 64, num_heads: 2, num_key_value_heads: 1,
          vocab_size: 64, batch_size: 4, sequence_length: 16, num_rounds: 2,
          wanda_goal: 1e9, least_squares_goal: 0.0}
  once: {hidden_size: 16, intermediate_size: 32, num_heads: 2, num_key_value_heads: 2,
         vocab_size: 64, batch_size: 4, sequence_length: 8, num_rounds: 1, num_admm_steps: 2}
  large: {hidden_size: 16, intermediate_size: 32, device: cuda, num_rounds: 1}
"""


@pytest.mark.slow
def test_prune_suite_writes_every_method(tmp_path):
    (tmp_path / "layers.yaml").write_text(PRUNE_CONFIG)
    output = tmp_path / "prune.json"
    benchmark("--suite", "prune", "--config", tmp_path / "layers.yaml", "--output", output)
    result = json.loads(output.read_text())
    small = result["layers"]["small"]
    assert small["num_weights"] == 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64
    assert small["num_tokens"] == 64
    assert small["calibration"].keys() == {
        "forward pass alone", "with second moments", "with both streams' moments", "movement",
        "sdmprune, importance", "block_entropy, entropies", "wanda, whole",
    }  # fmt: skip
    assert small["calibration"]["forward pass alone"]["ratio"]["median"] == 1.0
    assert small["sparsities"]["0.5"].keys() == {
        "magnitude", "wanda", "sparsegpt", "mama, score", "mama, least squares",
    }  # fmt: skip
    assert small["sparsities"]["0.75"].keys() == {"alps", "mama + admm"}
    for sides in (small["calibration"], *small["sparsities"].values()):
        assert all(side["seconds"]["median"] > 0 for side in sides.values())
    assert [(row["what"], row["met"]) for row in result["goals"]] == [
        ("Wanda / forward pass alone", True),
        ("least squares / SparseGPT at 0.5", False),
    ]
    assert result["layers"]["once"]["sparsities"]["0.75"].keys() == {
        "admm, eigenpairs", "admm, 2 steps",
    }  # fmt: skip
    once = result["layers"]["once"]["sparsities"]["0.5"]["sparsegpt"]["seconds"]
    assert once["quartiles"] == [once["median"]] * 2
    if not torch.cuda.is_available():
        assert result["layers"]["large"] == {"not_run": "no CUDA device"}


def test_shipped_layers_are_those_that_are_named():
    layers = load_shapes(ROOT / "configs/benchmark/prune.yaml", LayerShapes).layers
    sizes = {
        name: sum(size.numel() for size in shape.prunable_shapes().values())
        for name, shape in layers.items()
    }
    assert sizes["1B"] == 973_078_528 // 16
    assert sizes["8B"] == 218_103_808
    assert sizes["tiny"] == 331_776 // 3


def test_statistics_of_a_layer_are_shared_and_start_anew():
    shape = LayerShape(
        hidden_size=16, intermediate_size=32, num_rounds=1, batch_size=2, sequence_length=8
    )
    bench = LayerBench(shape)
    first, second = bench.fresh_statistics(), bench.fresh_statistics()
    names = {name.rsplit(".", 2)[1]: name for name in first}
    assert first[names["q_proj"]] is first[names["v_proj"]]
    assert first[names["q_proj"]] is not first[names["o_proj"]]
    first[names["q_proj"]].inverse_factor  # noqa: B018
    assert "inverse_factor" in vars(first[names["v_proj"]])
    assert "inverse_factor" not in vars(second[names["v_proj"]])


INFERENCE_CONFIG = """
break_even_sparsities: [0.9]
models:
  tiny: {hidden_size: 32, intermediate_size: 128, num_layers: 1, num_heads: 2,
         num_key_value_heads: 1, vocab_size: 64, batch_sizes: [1, 2], new_tokens: 3,
         prefill_tokens: 5, num_rounds: 2, dtypes: [float32, bfloat16], sparsities: [0.9],
         narrow_mlp: 0.5}
  large: {hidden_size: 32, intermediate_size: 128, num_layers: 1, device: cuda, batch_sizes: [1],
          new_tokens: 3, prefill_tokens: 5, num_rounds: 2, dtypes: [bfloat16], sparsities: [],
          narrow_mlp: 0.5}
"""


@pytest.mark.slow
def test_inference_suite_writes_every_export(tmp_path):
    (tmp_path / "models.yaml").write_text(INFERENCE_CONFIG)
    output = tmp_path / "inference.json"
    benchmark("--suite", "inference", "--config", tmp_path / "models.yaml", "--output", output)
    result = json.loads(output.read_text())
    found = result["models"]["tiny"]
    assert [(row["export"], row["dtype"]) for row in found["exports"]] == [
        (name, dtype)
        for dtype in ("float32", "bfloat16")
        for name in ("dense", "packed", "csr", "narrow")
    ]
    rows = {(row["export"], row["dtype"]): row for row in found["exports"]}
    for (name, dtype), row in rows.items():
        assert ("decode_2" in row and "prefill" in row) == (name != "packed")
        exact = name in ("dense", "packed")
        assert row["largest_logit_difference"] <= (0 if exact else 0.05) * row["largest_logit"]
        if name in ("dense", "narrow"):
            kept = {"dense": 128, "narrow": 64}[name]
            weights = 64 * 32 + 32 * 32 * 3 + 3 * 32 * kept + 3 * 32
            size = row["bytes"] / {"float32": 4, "bfloat16": 2}[dtype]
            assert weights <= size <= weights + 2000
    assert rows["dense", "float32"]["decode_1"]["ratio"]["median"] == 1.0
    linear = 64 * 32 + 32 * 32 * 3
    ratio = (linear + 3 * 32 * 128) / (linear + 3 * 32 * 64)
    assert rows["narrow", "float32"]["flop_ratio"] == pytest.approx(ratio)
    assert rows["packed", "bfloat16"]["prunable_ratio"] == pytest.approx(6.15, rel=0.01)
    assert len(result["goals"]) == 2 * (2 + 3) + 1
    assert result["break_even"]["1"]["bfloat16"]["0.9"]["median"] > 0
    if not torch.cuda.is_available():
        assert result["models"]["large"] == {"not_run": "no CUDA device"}


QUALITY_CONFIG = """
run: {stages: [sweep]}
task: {num_calibration: 8, num_test: 20, num_train: 50}
evaluate: {max_new_tokens: 8}
sweep:
  seeds: [3, 1]
  levels: [0.3, 0.5]
  headline: ours
  rows:
    ours: {method: mama, redistribution: least_squares}
    theirs: {method: magnitude, redistribution: none}
    2 of 4: {method: magnitude, redistribution: none, scope: "2:4"}
"""


@pytest.mark.slow
def test_quality_suite_compares_paired_by_draw(tmp_path):
    (tmp_path / "quality.yaml").write_text(QUALITY_CONFIG)
    output = tmp_path / "quality.json"
    benchmark("--suite", "quality", "--config", tmp_path / "quality.yaml", "--output", output)
    result = json.loads(output.read_text())
    assert (result["seeds"], result["headline"], result["num_prompts"]) == ([1, 3], "ours", 20)
    assert result["dense"]["accuracy"] == 1.0
    rows = {(row["method"], row["sparsity"]): row for row in result["rows"]}
    assert list(rows) == [
        ("ours", 0.3), ("theirs", 0.3), ("ours", 0.5), ("theirs", 0.5), ("2 of 4", 0.5)
    ]  # fmt: skip
    for (method, level), row in rows.items():
        kls = row["kl"]["by_seed"]
        assert row["kl"]["median"] == median(kls)
        assert all(kl > 0 for kl in kls)
        own = rows["ours", level]["kl"]["by_seed"]
        wanted = None if method == "ours" else median(a / b for a, b in zip(own, kls, strict=True))
        assert row.get("kl_ratio", {}).get("median") == wanted
        mean = sum(row["perplexity"]["by_seed"]) / 2
        assert row["is_broken"] == (mean > result["unigram_perplexity"])
        assert 0 <= row["accuracy"]["median"] <= 1 <= row["perplexity"]["median"]
    assert str(tmp_path) not in output.read_text()


def test_quality_suite_refuses_what_it_cannot_sum_up(tmp_path):
    path = tmp_path / "quality.yaml"
    path.write_text(QUALITY_CONFIG.replace("[3, 1]", "[3]"))
    with pytest.raises(UserError, match=r"^sweep\.seeds: \[3\]: "):
        quality.run(path)
    path.write_text("run: {stages: [prune]}")
    with pytest.raises(UserError, match=r"^run\.stages: "):
        quality.run(path)


def test_shipped_quality_rows_are_those_of_the_sweep():
    shipped, whole = (
        load_config(ROOT / "configs" / name, {}).sweep
        for name in ("benchmark/quality.yaml", "sweep.yaml")
    )
    assert list(shipped.rows) == ["MAMA", "SparseGPT", "Wanda"]
    assert shipped.rows.items() <= whole.rows.items()
    assert (shipped.seeds, shipped.headline) == (whole.seeds, whole.headline)
    assert set(shipped.levels) <= set(whole.levels)


def test_memory_of_a_call_is_what_it_holds_at_its_peak():
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    if memory.held is None:
        assert memory.bytes_needed() is None
        return
    torch.ones(2**24).add_(1)
    needed = memory.bytes_needed()
    assert 0.98 * 2**26 <= needed < 2**26 + 2**24
    memory.start()
    assert memory.bytes_needed() < 2**24


@pytest.mark.slow
def test_clipping_suite_writes_every_observation(tmp_path):
    output = tmp_path / "clipping.json"
    benchmark("--suite", "clipping", "--steps", "3", "--output", output)
    result = json.loads(output.read_text())
    assert 0 < result["pruned_share_of_squared_norm"]["median"] < 1
    assert result["factors"]["none"] == {"median": 1.0, "quartiles": [1.0, 1.0], "clipped_steps": 0}
    assert result["factors"]["kept"]["median"] >= result["factors"]["all"]["median"]
    for observations in result["observations"].values():
        assert observations.keys() == {
            "gradient", "displacement", "proposed", "negative_gradient", "fisher",
        }  # fmt: skip


@pytest.mark.slow
def test_step_suite_counts_the_refinement_in(monkeypatch):
    monkeypatch.setattr("launch.benchmarks.step.COMPLETION_TOKENS", 4)
    compared = []
    monkeypatch.setattr(
        "launch.benchmarks.step.ratios", lambda *sides: compared.append(sides) or ratios(*sides)
    )
    shape = Shape(hidden_size=16, intermediate_size=32, num_layers=1, vocab_size=128, batch_size=4)
    result = step.compare(shape, 2)
    assert result["num_steps"] == 2
    assert result["seconds"].keys() == {step.TRL, step.OURS, step.TWO_MASKS}
    assert result["parts"].keys() == {"TRL's reference model", "teacher", "refinement"}
    sides = (*result["seconds"].values(), *result["parts"].values())
    assert all(side["median"] > 0 for side in sides)
    whole = result["seconds"][step.OURS]["median"] + result["parts"]["refinement"]["median"] / 10
    assert median(compared[0][0]) == pytest.approx(whole)
    assert median(compared[0][1]) == pytest.approx(result["seconds"][step.TRL]["median"])
    assert result["ratio_to_trl"][step.OURS] == ratios(*compared[0])
    assert result["met"] == (result["ratio_to_trl"][step.OURS]["median"] <= step.GOAL)


def test_shapes_say_what_is_wrong(tmp_path):
    path = tmp_path / "shapes.yaml"
    path.write_text("shapes: {a: {hidden_size: no, layers: 2}}\ncommunication: {}\n")
    with pytest.raises(UserError) as caught:
        load_shapes(path)
    for part in ("shapes.a.hidden_size", "shapes.a.layers", "shapes.a.num_layers"):
        assert part in str(caught.value)
    with pytest.raises(UserError, match="No such file"):
        load_shapes(tmp_path / "absent.yaml")


def test_shipped_shapes_are_those_that_are_named():
    shapes = load_shapes(ROOT / "configs/benchmark/engine.yaml")
    sizes = {
        name: sum(size.numel() for size in shape.prunable_shapes().values())
        for name, shape in (shapes.shapes | shapes.communication).items()
    }
    assert sizes["1B"] == 973_078_528  # Llama 3.2 1B: 1.236 G less 0.263 G of embeddings and norms
    assert sizes["8B_layer"] == 218_103_808
    assert sizes["125M"] + 768 * 50304 == 123_568_128
    assert sizes["wide"] == 9 * sizes["narrow"]
    assert sizes["deep"] == 4 * sizes["narrow"]


def test_bytes_moved_are_those_of_the_issue():
    rules = {name: ADAMW_BYTES + engine_bytes(rule) for name, rule in RULES.items()}
    assert rules["gradient + negative_gradient, float32"] == 52 + 2 / 8
    assert rules["gradient + proposed, float32"] == 60 + 1 / 8
    assert rules["gradient + proposed, bfloat16"] == 52 + 1 / 8
    assert rules["displacement + proposed, float32"] == 56 + 1 / 8


def test_sides_alternate_and_prepare_before_each_sample():
    calls = []
    sides = {
        name: Side(lambda n=name: calls.append(n), lambda n=name: calls.append(f"{n}!"), once=True)
        for name in "ab"
    }
    taken = alternate(sides, torch.device("cpu"), 2)
    assert [len(values) for values in taken.values()] == [2, 2]
    assert calls[-8:] == ["a!", "a", "b!", "b"] * 2


def test_summaries_are_medians_within_a_round():
    assert summary([1.0, 2.0, 3.0]) == {"median": 2.0, "quartiles": [1.5, 2.5]}
    assert ratios([2.0, 40.0, 3.0], [1.0, 10.0, 1.0])["median"] == 3.0


def test_collectives_are_counted(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        with Communicated() as communicated:
            dist.all_reduce(torch.ones(5, dtype=torch.int64))
            torch.ones(1000).sum()
            dist.all_gather([torch.ones(3)], torch.ones(3))
    finally:
        dist.destroy_process_group()
    assert communicated.calls == 2
    assert communicated.num_bytes == 5 * 8 + 2 * 3 * 4


def test_distinct_values_are_finite_and_positive():
    values = torch.cat(
        [v.flatten() for v in distinct({"a": torch.Size([30, 7]), "b": torch.Size([9])}).values()]
    )
    assert values.unique().numel() == 219
    assert values.min() > 0
    assert values.isfinite().all()


def test_missed_goals_are_listed():
    shapes = {"small": load_shapes(ROOT / "configs/benchmark/engine.yaml").shapes["125M"]}
    found = {
        "optimizer_step": {"rules": {"rule": {"ratio": {"median": 3.0}}}},
        "state_bytes_per_weight": {"float32": 4.125, "bfloat16": 2.125},
        "refinement": {"scopes": {"matrix": {"passes": {"median": 13.0}}}},
        "training_step": {"share": 0.01},
    }
    rows = engine.goals(
        shapes | {"absent": shapes["small"]}, {"small": found, "absent": {"not_run": ""}}
    )
    assert [row["what"] for row in rows if not row["met"]] == [
        "step / fused AdamW: rule",
        "passes of a refinement: matrix",
    ]


def test_observations_are_compared_by_what_is_ranked():
    masks = {"w": torch.arange(200) < 100}
    reference = torch.linspace(-1, 1, 100)
    assert compare(2 * reference, reference, masks, "gradient") == {
        "scale": pytest.approx(2.0), "rank_correlation": pytest.approx(1.0), "same_choice": 1.0,
    }  # fmt: skip
    assert compare(-reference, reference, masks, "gradient")["same_choice"] == 0.0
    assert compare(-reference, reference, masks, "proposed")["rank_correlation"] > 0.99
