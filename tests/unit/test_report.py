"""report.json keeps its schema, report.md holds every number, the lines to try the model run."""

import json
import re
import runpy
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.evaluation.accuracy import AccuracyResult
from pipeline.evaluation.agreement import Agreement
from pipeline.evaluation.figures import Picture
from pipeline.evaluation.harness import TaskScore
from pipeline.evaluation.intervals import (
    mean_interval,
    paired_difference_interval,
    paired_ratio_interval,
    wilson_interval,
)
from pipeline.evaluation.markdown import render_markdown
from pipeline.evaluation.more_tables import more_tables
from pipeline.evaluation.perplexity import Perplexity
from pipeline.evaluation.report import Measurements, build_report, write_report
from pipeline.evaluation.sampled_accuracy import SampledAccuracy
from pipeline.evaluation.summary import RunDescription, Sample, model_table, terminal_summary

NUM_PROMPTS = 200
PICTURE = Picture("The student is as good", b"PNG", "<svg>wide</svg>", "<svg>narrow</svg>")
PER_LAYER = {
    "model.layers.0.self_attn.q_proj.weight": 0.875,
    "model.layers.0.mlp.up_proj.weight": 0.925,
}


def accuracy(num_correct: int) -> AccuracyResult:
    correct = [i < num_correct for i in range(NUM_PROMPTS)]
    return AccuracyResult(num_correct / NUM_PROMPTS, correct, ["x"] * NUM_PROMPTS, NUM_PROMPTS)


def measurements(num_correct: int, perplexity: float | None, kl: float | None) -> Measurements:
    return Measurements(
        accuracy=accuracy(num_correct),
        perplexity=Perplexity(perplexity, 1234, 17),
        agreement=Agreement(kl, 0.625, 999),
    )


def full_report(**changes):
    arguments = {
        "models": {
            "student": measurements(186, 1.09, 0.021),
            "teacher": replace(measurements(194, 1.03, 0.0), agreement=None),
            "dense": measurements(193, 1.04, 0.0),
            "pruned": measurements(3, None, None),
            "distilled": measurements(120, 1.41, 0.35),
        },
        "measured_sparsity": 0.90004,
        "per_layer_sparsity": PER_LAYER,
        "target_sparsity": 0.9,
        "perplexity_on": "the reference answers",
        "refinement": [
            {"stage": "distill", "step": 10, "target": 0.4321, "pruned": 5555, "regrown": 77},
            {
                "stage": "grpo",
                "step": 130,
                "target": 0.9,
                "pruned": 31,
                "regrown": 0,
                "accepted": True,
                "reward_before": 0.5,
                "reward_after": 0.625,
                "score": "mix",
                "waited": 2.5,
            },
        ],
        "timing": {"prune": 1.5, "distill": 65.4, "grpo": 130.0},
        "peak_memory_bytes": 3 * 2**29,
        "versions": {"torch": "2.13.0"},
        "seed": 42,
        "git_commit": "0123abc",
        "config_hash": "feed0",
    }
    return build_report(**(arguments | changes))


def description(**changes) -> RunDescription:
    arguments = {
        "asked": {"Teacher": "bundled", "Task": "a|b*c"},
        "command": "accelerate launch launch/train.py --config configs/quickstart.yaml",
        "student_path": "runs/quickstart/grpo/model",
        "example_prompt": "a",
        "max_new_tokens": 3,
        "name": "a_run",
        "pictures": {"plots/accuracy.png": PICTURE},
        "samples": [
            Sample(
                prompt="12*3|4\n=",
                answer="48",
                completions={"teacher": "forty-eight", "student": "x" * 700},
                correct={"teacher": True, "student": False},
            )
        ],
    }
    return RunDescription(**(arguments | changes))


def test_report_has_the_keys_of_the_schema():
    report = full_report()
    assert set(report) == {
        "schema", "sparsity", "accuracy", "perplexity", "kl_to_teacher", "top1_with_teacher",
        "refinement", "timing", "peak_memory_bytes", "versions", "seed", "git_commit",
        "config_hash",
    }  # fmt: skip
    models = ["teacher", "dense", "pruned", "distilled", "student"]
    assert report["schema"] == 1
    assert set(report["sparsity"]) == {"target", "measured", "per_layer"}
    assert list(report["accuracy"]) == [
        *models, "num_prompts", "ci95", "student_minus_dense", "student_over_dense"
    ]  # fmt: skip
    assert list(report["accuracy"]["ci95"]) == models
    assert list(report["perplexity"]) == [*models, "num_tokens", "seq_len", "on"]
    assert list(report["kl_to_teacher"]) == models[1:]
    assert len(report["refinement"]) == 2


def test_report_holds_what_was_measured():
    report = full_report()
    assert report["accuracy"]["student"] == 0.93
    assert report["accuracy"]["ci95"]["student"] == list(wilson_interval(186, 200))
    lists = accuracy(186).correct, accuracy(193).correct
    assert report["accuracy"]["student_over_dense"] == {
        "value": pytest.approx(186 / 193), "ci95": list(paired_ratio_interval(*lists))
    }  # fmt: skip
    assert report["accuracy"]["student_minus_dense"] == {
        "value": pytest.approx(-0.035), "ci95": list(paired_difference_interval(*lists))
    }  # fmt: skip
    assert report["perplexity"]["num_tokens"] == 1234
    assert report["kl_to_teacher"]["student"] == 0.021
    assert report["top1_with_teacher"]["student"] == 0.625


def test_what_is_not_finite_is_null_and_what_was_not_measured_is_absent():
    assert full_report()["perplexity"]["pruned"] is None
    assert full_report()["kl_to_teacher"]["pruned"] is None
    report = build_report(
        models={"dense": Measurements(accuracy=accuracy(9))},
        measured_sparsity=0.0,
        per_layer_sparsity=PER_LAYER,
    )
    assert set(report) == {"schema", "sparsity", "accuracy"}
    assert set(report["sparsity"]) == {"measured", "per_layer"}
    assert set(report["accuracy"]) == {"dense", "num_prompts", "ci95"}


def test_a_ratio_to_a_model_that_answers_nothing_is_absent():
    report = full_report(models={"dense": measurements(0, 9, 0), "student": measurements(0, 9, 0)})
    assert "student_over_dense" not in report["accuracy"]
    assert report["accuracy"]["student_minus_dense"]["value"] == 0
    assert "points" not in terminal_summary(report, description())


def test_written_report_reads_back_the_same(tmp_path):
    report = full_report()
    write_report(tmp_path, report, description())
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "plots" / "accuracy.png").read_bytes() == b"PNG"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "plots",
        "report.html",
        "report.json",
        "report.md",
    ]


def test_markdown_holds_every_number(tmp_path):
    write_report(tmp_path, full_report(), description())
    text = (tmp_path / "report.md").read_text()
    for wanted in (
        "0.9000", "asked for 0.9",  # sparsity
        "97.0 % [93.6, 98.6]", "96.5 % [93.0, 98.3]", "1.5 %", "60.0 %", "93.0 %", "200 held-out",
        "0.964 [", "-3.5 points [",  # the student beside the dense model
        "1.03", "1.04", "not finite", "1.41", "1.09", "the reference answers", "1,234 tokens",
        "0.021", "0.35", "62.5 %", "87.5 % to 92.5 %",
        "0.4321", "5,555", "77", "130", "yes", "0.6250", "mix", "2.5000",  # refinement
        "1.5 s", "1 min 5 s", "2 min 10 s", "3 min 17 s", "1.50 GiB",
        "42", "0123abc", "feed0", "2.13.0", "launch/train.py --config configs/quickstart.yaml",
        "![The student is as good](plots/accuracy.png)",
        "✓ forty-eight", "✗ xxx", "runs/quickstart/grpo/model",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_markdown_tables_keep_their_shape_whatever_the_texts_hold(tmp_path):
    write_report(tmp_path, full_report(), description())
    text = (tmp_path / "report.md").read_text()
    assert r"a\|b\*c" in text
    assert r"> **Prompt.** 12\*3\|4<br>=" in text
    assert "x" * 600 + " ..." in text
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(widths) == 1, block


def test_long_answers_of_teacher_and_student_stand_side_by_side_and_others_are_folded():
    completions = {"teacher": "a" * 99, "dense": "b", "pruned": "c", "student": "d"}
    sample = Sample(
        prompt="p", answer="r", completions=completions, correct=dict.fromkeys(completions, True)
    )
    text = render_markdown(full_report(), description(samples=[sample]))
    assert f"| teacher | student |\n| --- | --- |\n| ✓ {'a' * 99} | ✓ d |" in text
    assert "<details><summary>dense, pruned</summary>\n\n| model | answer |" in text
    assert "| dense | ✓ b |" in text


def test_markdown_of_a_bare_measurement_has_no_empty_sections(tmp_path):
    report = build_report(
        models={"dense": Measurements(accuracy=accuracy(9))},
        measured_sparsity=0.0,
        per_layer_sparsity=PER_LAYER,
    )
    write_report(tmp_path, report, description(pictures={}, samples=[]))
    text = (tmp_path / "report.md").read_text()
    for heading in ("Refinement", "Sample", "cost", "Perplexity:"):
        assert heading not in text


def test_terminal_summary_is_a_table_and_the_way_to_the_model():
    lines = terminal_summary(full_report(), description()).splitlines()
    table = lines[: lines.index("")]
    assert [line.split()[0] for line in table] == [
        "model", "teacher", "dense", "pruned", "distilled", "student"
    ]  # fmt: skip
    assert table[1].split()[-2:] == ["-", "-"]
    column = table[0].index("perplexity")
    assert table[5][column:].startswith("1.09")
    assert all(len(line) <= 100 for line in table)
    assert any("Sparsity 0.9000" in line for line in lines)
    assert any("runs/quickstart/grpo/model" in line for line in lines)


CHAT_TEMPLATE = "{% for message in messages %}{{ message.content }} {% endfor %}"


@pytest.mark.parametrize("prompt", ["a b", [{"role": "user", "content": "a b"}]])
def test_the_lines_to_try_the_model_run(tmp_path, capsys, prompt):
    words = ["<pad>", "<end>", "a", "b"]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=None,
    )  # fmt: skip
    folder = tmp_path / "it's a model"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shown = terminal_summary(
        full_report(), description(student_path=str(folder), example_prompt=prompt)
    )
    python = [line[4:] for line in shown.splitlines() if line.startswith("    ")]
    assert len(python) == 3
    script = tmp_path / "try_it.py"
    script.write_text("\n".join(python))
    runpy.run_path(str(script))
    assert "\na b" in "\n" + capsys.readouterr().out


def test_text_perplexity_has_a_column_where_it_was_measured():
    measured = {
        name: Measurements(accuracy=accuracy(190), text_perplexity=Perplexity(value, 4000, 512))
        for name, value in (("dense", 31.5), ("student", None))
    }
    report = full_report(models=measured, text_path="other.txt")
    assert report["text_perplexity"] == {
        "dense": 31.5, "student": None, "num_tokens": 4000, "seq_len": 512, "on": "other.txt"
    }  # fmt: skip
    header, *rows = model_table(report)
    assert header[-1] == "text perplexity"
    assert [row[-1] for row in rows] == ["31.5", "not finite"]
    page = render_markdown(report, description())
    assert "Text perplexity: per token of other.txt; 4,000 tokens in windows of 512." in page
    assert "text perplexity" not in model_table(full_report())[0]


def test_the_student_a_stage_kept_is_said_with_its_step_and_the_phases_stand_in_order():
    heldout = {"on_policy": {"steps": 1500, "step": 1200, "accuracy": 0.9375}}
    models = {
        "student": measurements(186, 1.09, 0.021),
        "on_policy": measurements(150, 1.2, 0.1),
        "distilled": measurements(120, 1.41, 0.35),
    }
    report = full_report(models=models, heldout=heldout)
    assert report["heldout"] == heldout
    assert [row[0] for row in model_table(report)[1:]] == ["distilled", "on_policy", "student"]
    said = "Stage on_policy left its student of step 1,200 of 1,500, right on 93.8 % of the prompts"
    assert said in terminal_summary(report, description())
    assert said in render_markdown(report, description())
    assert "heldout" not in full_report()


def measured_more(passes: list[int], scores: dict[str, TaskScore]) -> Measurements:
    return Measurements(
        accuracy=accuracy(190),
        text_perplexity=Perplexity(5.5, 4000, 2048, stride=1024),
        sampled=SampledAccuracy(passes, num_samples=4, temperature=0.7),
        zero_shot=scores,
    )


def more_report():
    """A dense model that has two tasks, and a student with one more."""
    dense = {
        "piqa": TaskScore("acc_norm", 0.75, 0.01, 100),
        "boolq": TaskScore("acc", 0.5, None, 80),
    }
    student = dense | {"word_ppl": TaskScore("word_perplexity", 12.0, None, 9)}
    return full_report(
        models={
            "dense": measured_more([0, 4, 2, 1], dense),
            "student": measured_more([0, 0, 0, 1], student),
        },
        text_path="a_b wiki test",
        pass_at_k=[1, 4],
    )


def test_pass_at_k_and_zero_shot_tasks_are_in_the_report():
    report = more_report()
    found = report["pass_at_k"]
    assert found["dense"] == {"1": pytest.approx(7 / 16), "4": pytest.approx(3 / 4)}
    assert found["student"] == {"1": pytest.approx(1 / 16), "4": pytest.approx(1 / 4)}
    assert found["ci95"]["dense"]["4"] == list(mean_interval([0, 1, 1, 1]))
    assert (found["num_prompts"], found["num_samples"], found["temperature"]) == (4, 4, 0.7)
    assert report["zero_shot"]["dense"]["piqa"] == {
        "metric": "acc_norm", "value": 0.75, "stderr": 0.01, "num_documents": 100, "num_fewshot": 0
    }  # fmt: skip
    assert report["text_perplexity"]["stride"] == 1024
    assert json.loads(json.dumps(report)) == report


def test_their_tables_and_notes_stand_in_the_page():
    report = more_report()
    page = render_markdown(report, description())
    assert r"a\_b wiki test; 4,000 tokens in windows of 2,048, 1,024 apart." in page
    for row in (
        "| answers | dense | student |",
        "| pass@1 | 43.8 % \\[",
        "| task | examples | metric | dense | student |",
        "| piqa | 0 | acc\\_norm | 75.00 ± 1.00 % | 75.00 ± 1.00 % |",
        "| boolq | 0 | acc | 50.00 % | 50.00 % |",
        "| word\\_ppl | 0 | word\\_perplexity | - | 12 |",
        "| average |  |  | 62.50 % | 62.50 % |",
    ):
        assert row in page, row
    assert more_tables(full_report()) == []


def test_a_table_says_how_many_examples_each_task_shows():
    scores = {
        name: TaskScore("acc", 0.5, None, 9, shots)
        for name, shots in (("five", 5), ("zero", 0), ("group", None))
    }
    dense = Measurements(accuracy=accuracy(190), zero_shot=scores)
    (found,) = more_tables(full_report(models={"dense": dense}))
    assert found.title == "Few-shot tasks"
    assert [row[:2] for row in found.rows] == [
        ["task", "examples"], ["five", "5"], ["zero", "0"], ["group", "mixed"], ["average", ""]
    ]  # fmt: skip
