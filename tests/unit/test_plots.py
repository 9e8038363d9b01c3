"""Every picture is drawn in all its forms, under a title that says what the data say."""

import math
import struct
from xml.etree import ElementTree

import pytest
import torch

from pipeline.evaluation import movement_plot, training_plots
from pipeline.evaluation.figures import DARK_PAGE, for_dark_page
from pipeline.evaluation.movement_plot import movement_histogram, plot_movement
from pipeline.evaluation.plots import plot_accuracy, plot_layer_sparsity, plot_perplexity
from pipeline.evaluation.training_plots import plot_training

ACCURACY = {"teacher": 0.97, "dense": 0.96, "pruned": 0.01, "student": 0.93}
MATRICES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


def assert_picture(picture):
    assert picture.png[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", picture.png[16:24])
    assert width == 1000
    assert height > 200
    for svg, inches in ((picture.wide, 8), (picture.narrow, 3.75)):
        root = ElementTree.fromstring(svg)
        assert root.get("width") == f"{72 * inches:g}pt"
        assert 100 < float(root.get("height").removesuffix("pt")) < 72 * height / 125 + 1
        assert len(svg) > 5000


def test_accuracy():
    ci95 = {name: (value - 0.01, value + 0.01) for name, value in ACCURACY.items()}
    picture = plot_accuracy(ACCURACY, ci95, num_prompts=2000, sparsity=0.9)
    expected = "At 90.0 % sparsity the student model is right on 93.0 % of the prompts"
    assert picture.title == f"{expected}, the dense model on 96.0 %"
    assert_picture(picture)


def test_accuracy_of_one_model_alone():
    picture = plot_accuracy({"dense": 0.5}, {"dense": (0.4, 0.6)}, num_prompts=9, sparsity=0)
    assert picture.title == "At 0.0 % sparsity the dense model is right on 50.0 % of the prompts"
    assert_picture(picture)


@pytest.mark.parametrize("worst", [1.0301, 58421.0])
def test_perplexity(worst):
    values = {"dense": 1.03, "pruned": worst, "student": 1.09}
    picture = plot_perplexity(values, on="the reference answers")
    assert picture.title == "The student model has a perplexity of 1.090, the dense model 1.030"
    assert_picture(picture)


@pytest.mark.parametrize("num_layers", [2, 60])
def test_layer_sparsity(num_layers):
    names = [f"model.layers.{i}.{matrix}.weight" for i in range(num_layers) for matrix in MATRICES]
    per_layer = {name: 0.5 + 0.4 * i / len(names) for i, name in enumerate(names)}
    per_layer["model.layers.1.self_attn.q_proj.weight"] = 0.25
    picture = plot_layer_sparsity(per_layer)
    assert "25.0 % (q_proj of layer 1)" in picture.title
    assert f"(down_proj of layer {num_layers - 1})" in picture.title
    assert_picture(picture)


def test_equal_layers_are_said_to_be_equal():
    names = [f"model.layers.{i}.{matrix}.weight" for i in range(2) for matrix in MATRICES]
    picture = plot_layer_sparsity(dict.fromkeys(names, 0.9))
    assert picture.title == "Every one of the 6 prunable matrices has 90.0 % zeros"


def training_logs():
    distill = [{"step": s, "loss": math.exp(-s / 20), "sparsity": s / 200} for s in range(1, 101)]
    grpo = [{"step": s, "loss": 0.0, "reward": s / 60, "sparsity": 0.5} for s in range(1, 61)]
    return {"distill": [*distill, {"step": 100, "train_loss": 0.2}], "grpo": grpo}


def test_training():
    picture = plot_training(training_logs())
    # 60 rewards are smoothed over 3 neighbours on each side: (1 + 2 + 3 + 4) / 4 / 60 = 0.0417.
    assert (
        picture.title == "Reward goes from 0.0417 to 0.975 while sparsity goes from 0.5 % to 50.0 %"
    )
    assert_picture(picture)


def test_steps_are_counted_across_stages(monkeypatch):
    drawn = []
    monkeypatch.setattr(training_plots, "finish", lambda figure, title: drawn.append(figure))
    plot_training(training_logs())
    loss, reward, sparsity = drawn[0].axes
    steps = [list(line.get_xdata()) for line in reward.lines[-2:]]
    assert steps[0] == list(range(101, 161))
    assert steps[1] == [100, 100]  # where the stage begins
    assert [line.get_xdata()[-1] for line in sparsity.lines] == [100, 160, 100]
    assert loss.lines[0].get_xdata()[0] == 1
    assert loss.get_xlim() == (0, 160)


def test_training_without_grpo_shows_the_loss():
    picture = plot_training({"distill": training_logs()["distill"]})
    assert picture.title.startswith("Loss goes from 0.8")
    assert_picture(picture)


def test_held_out_accuracy_has_a_panel_with_every_measurement(monkeypatch):
    drawn = []
    monkeypatch.setattr(training_plots, "finish", lambda figure, title: drawn.append(figure))
    logs = training_logs()
    logs["grpo"] += [{"step": step, "heldout_accuracy": step / 100} for step in (20, 60)]
    plot_training(logs)
    _, _, accuracy, sparsity = drawn[0].axes
    assert accuracy.get_ylabel() == "accuracy on\nprobe prompts"
    points = [line for line in accuracy.lines if list(line.get_xdata()) == [120, 160]]
    assert points
    assert list(points[0].get_ydata()) == [0.2, 0.6]
    assert accuracy.get_ylim() == sparsity.get_ylim()


def test_the_title_compares_no_loss_with_that_of_another_stage():
    distill = [{"step": s, "loss": 4.0} for s in range(1, 5)]
    on_policy = [{"step": s, "loss": 0.4 / s} for s in (1, 2)]
    picture = plot_training({"distill": distill, "on_policy": on_policy})
    assert picture.title == "Loss goes from 0.4 to 0.2"


def test_movement_histogram_counts_every_weight_once():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(40, 30, generator=generator).exp() * torch.randn(
        40, 30, generator=generator
    )
    first[:2] = 0
    second = torch.tensor([1e-30, -1e-30, 100.0])
    histogram = movement_histogram([first, second])
    values = [*first.double().flatten().tolist(), *second.double().tolist()]
    edges = histogram["edges"]
    assert edges[0] == pytest.approx(1e-6 * 100)
    assert edges[-1] == pytest.approx(100)
    assert histogram["zero"] == 60
    for side, sign in (("positive", 1), ("negative", -1)):
        counts = [0] * (len(edges) - 1)
        for value in values:
            if sign * value > 0:
                counts[max(0, sum(edge <= abs(value) for edge in edges[:-1]) - 1)] += 1
        assert histogram[side] == counts
    assert sum(histogram["positive"]) + sum(histogram["negative"]) + 60 == len(values)


def test_movement():
    kept = movement_histogram([torch.tensor([1e-3, 2e-3, 3e-3, -1e-4])])
    pruned = movement_histogram([torch.tensor([5.0, -7.0, 0.0])])
    picture = plot_movement({"gradient": kept, "proposed": pruned})
    expected = "Training pushes 75.0 % of the kept weights away from zero, 25.0 % towards it"
    assert picture.title == expected
    assert_picture(picture)


def test_movement_where_nothing_moved_and_nothing_is_pruned():
    histograms = {
        "displacement": movement_histogram([torch.zeros(5)]),
        "negative_gradient": movement_histogram([]),
    }
    picture = plot_movement(histograms)
    assert_picture(picture)


def test_no_line_of_movement_runs_through_the_legend(monkeypatch):
    drawn = []
    monkeypatch.setattr(movement_plot, "finish", lambda figure, title: drawn.append(figure))
    low = movement_histogram([torch.tensor([1e-9, -1e-9] * 9 + [1.0])])
    plot_movement({"gradient": low, "proposed": low})
    drawn[0].draw_without_rendering()
    for axes in drawn[0].axes:
        top = max(max(line.get_data().values) for line in axes.patches)
        assert axes.transData.transform((1, top))[1] < axes.get_legend().get_window_extent().y0


def test_squared_movement_says_where_half_of_it_is():
    kept = movement_histogram([torch.tensor([1.0, 1.0, 0.5, 0.25, 0.25])])
    picture = plot_movement({"squared": kept, "proposed": movement_histogram([])})
    assert picture.title == "Half of the squared movement is in 40.0 % of the kept weights"
    assert_picture(picture)


def rich_logs():
    grpo = [
        {
            "step": s,
            "reward": 0.5 + s / 50,
            "rewards/correctness/mean": s / 50,
            "rewards/my$format/mean": 0.5,
            "frac_reward_zero_std": 0.25,
            "teacher_kl": 0.1,
            "completions/mean_length": 4.0,
            "sparsity": 0.5,
        }
        for s in range(1, 21)
    ]
    return {"distill": [{"step": 1, "loss": 0.5, "kl": 0.5, "sparsity": 0.5}], "grpo": grpo}


def test_every_quantity_of_a_run_has_a_panel_and_each_reward_a_line(monkeypatch):
    drawn = []
    monkeypatch.setattr(training_plots, "finish", lambda figure, title: drawn.append(figure))
    plot_training(rich_logs())
    labels = [axes.get_ylabel().replace("\n", " ") for axes in drawn[0].axes]
    assert labels == [
        "KL to the teacher (nats per token)",  # the loss is nothing else, and not drawn twice
        "mean reward per completion",
        "dead groups",
        "completion length (tokens)",
        "zeros among prunable weights",
    ]
    legend = drawn[0].axes[1].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == [
        "weighted sum", "correctness", r"my\$format"
    ]  # fmt: skip


def test_one_reward_alone_needs_no_legend(monkeypatch):
    drawn = []
    monkeypatch.setattr(training_plots, "finish", lambda figure, title: drawn.append(figure))
    logs = rich_logs()
    for entry in logs["grpo"]:
        del entry["rewards/my$format/mean"]
    logs["distill"][0]["loss"] = 0.75
    plot_training(logs)
    assert drawn[0].axes[0].get_ylabel().startswith("distillation loss")
    assert drawn[0].axes[2].get_legend() is None


def test_a_dark_page_has_no_black_ink():
    picture = plot_accuracy({"dense": 0.5}, {"dense": (0.4, 0.6)}, num_prompts=9, sparsity=0)
    assert "#7f7f7f" in picture.wide
    dark = for_dark_page(picture.wide)
    assert ElementTree.fromstring(dark).get("fill") == DARK_PAGE["#000000"].lower()
    for colour in DARK_PAGE:
        assert colour.lower() not in dark
