"""What stages hand each other: the schedule, how far it has come, and how masks are judged."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.artifacts import RunFolder, hash_json
from pipeline.config_loading import load_config
from pipeline.errors import UserError
from pipeline.evaluation.accuracy import AccuracyResult
from pipeline.evaluation.agreement import Agreement
from pipeline.evaluation.harness import TaskScore
from pipeline.evaluation.perplexity import Perplexity
from pipeline.evaluation.report import Measurements
from pipeline.evaluation.sampled_accuracy import SampledAccuracy
from pipeline.models.loading import load_tokenizer
from pipeline.models.prunable import prunable_weights
from pipeline.rollouts import Rollout
from pipeline.run import resumed_checkpoint
from pipeline.sparsity.schedule import Waiting
from pipeline.stages import evaluate, sweep
from pipeline.stages.distill import warn_of_cut_ends
from pipeline.stages.measure import comparable, from_json, to_json
from pipeline.stages.provenance import is_current, settle, stage_inputs
from pipeline.stages.prune import _prune
from pipeline.stages.training import end_step, first_step, stage_sparsity
from pipeline.stages.verification import mask_reward
from pipeline.training.manifest import write_manifest
from pipeline.training.mask_choice import MaskReward
from tests.unit.tiny_models import tiny

CONFIG = "configs/quickstart.yaml"
SHORT = {"distill.max_steps": 40, "grpo.max_steps": 20}


def test_a_later_command_goes_on_where_the_schedule_stood(tmp_path):
    folder = RunFolder.open(tmp_path)
    both = load_config(CONFIG, SHORT)
    assert first_step(both, folder, "distill") == 0
    assert first_step(both, folder, "grpo") == 40
    assert end_step(both, folder) == 36

    record = {"done": True, "max_steps": 40, "refine_end_step": 24}
    folder.write_record("distill", record)
    later = load_config(CONFIG, SHORT | {"run.stages": ["grpo", "evaluate"]})
    assert first_step(later, folder, "grpo") == 40
    assert end_step(later, folder) == 24
    sparsity = stage_sparsity(later, folder, "grpo", tmp_path)
    assert not any(sparsity.schedule.is_due(sparsity.first_step + step) for step in range(1, 21))


def test_a_model_that_was_only_measured_is_tried_from_a_folder_also_the_bundled_one(tmp_path):
    config = load_config(None, {"run.stages": ["evaluate"]})
    path = evaluate._student_path(config, RunFolder.open(tmp_path))
    assert (Path(path) / "config.json").is_file()


def test_a_stage_that_ended_early_counts_the_steps_it_took(tmp_path):
    folder = RunFolder.open(tmp_path)
    record = {"done": True, "max_steps": 40, "steps": 30, "refine_end_step": 24}
    folder.write_record("distill", record)
    later = load_config(CONFIG, SHORT | {"run.stages": ["grpo", "evaluate"]})
    assert first_step(later, folder, "grpo") == 30


@pytest.mark.parametrize(
    ("last", "final"),
    [({"step": 24}, True), ({"step": 20}, False), ({"step": 30, "waited": 10}, False)],
)
def test_a_stage_knows_whether_its_mask_is_the_final_one_also_behind_one_that_kept_it(
    tmp_path, last, final
):
    folder = RunFolder.open(tmp_path)
    folder.write_record("distill", {"done": True, "max_steps": 40, "refine_end_step": 24})
    folder.write_record("on_policy", {"done": True})
    for stage, entries in (("distill", [{"step": 10, "waited": 0}, last]), ("on_policy", [])):
        (folder.stage(stage) / "refinements.json").write_text(json.dumps(entries))
    stages = ["prune", "distill", "on_policy", "grpo", "evaluate"]
    config = load_config(CONFIG, SHORT | {"on_policy.max_steps": 5, "run.stages": stages})
    for stage in ("on_policy", "grpo"):
        sparsity = stage_sparsity(config, folder, stage, tmp_path)
        assert sparsity.starts_final == final
        assert sparsity.earlier[-1] == last
    assert not stage_sparsity(config, folder, "distill", tmp_path).starts_final


def test_steps_count_across_on_policy_where_it_refines(tmp_path):
    folder = RunFolder.open(tmp_path)
    stages = ["prune", "distill", "on_policy", "grpo", "evaluate"]
    values = SHORT | {"on_policy.max_steps": 30, "run.stages": stages}
    fixed = load_config(CONFIG, values)
    assert first_step(fixed, folder, "grpo") == 40
    assert stage_sparsity(fixed, folder, "on_policy", tmp_path).schedule is None
    refining = load_config(CONFIG, values | {"refine.stages": stages[1:4]})
    assert first_step(refining, folder, "on_policy") == 40
    assert first_step(refining, folder, "grpo") == 70
    assert end_step(refining, folder) == 54
    assert stage_sparsity(refining, folder, "on_policy", tmp_path).schedule.end_step == 54


def test_grpo_alone_starts_its_own_schedule(tmp_path):
    folder = RunFolder.open(tmp_path)
    alone = load_config(CONFIG, SHORT | {"run.stages": ["prune", "grpo", "evaluate"]})
    sparsity = stage_sparsity(alone, folder, "grpo", tmp_path)
    assert sparsity.first_step == 0
    assert sparsity.schedule.sparsity_at(12) == pytest.approx(0.9)


def test_a_schedule_that_waited_goes_on_in_the_next_stage(tmp_path):
    folder = RunFolder.open(tmp_path)
    record = {"done": True, "max_steps": 40, "refine_end_step": 24}
    folder.write_record("distill", record)
    source = folder.stage("distill")
    last = {"step": 40, "waited": 20.0, "halvings": 1}
    (source / "refinements.json").write_text(json.dumps([{"step": 30}, last]))
    later = load_config(CONFIG, SHORT | {"run.stages": ["grpo", "evaluate"], "refine.verify": True})
    sparsity = stage_sparsity(later, folder, "grpo", source)
    waiting = Waiting.after(sparsity.schedule, sparsity.earlier)
    assert (waiting.position, waiting.ahead(50, 1)) == (20, 22)
    assert waiting.is_due(50)
    assert sparsity.is_last
    assert not stage_sparsity(load_config(CONFIG, SHORT), folder, "distill", source).is_last


def test_a_schedule_goes_on_behind_a_stage_that_verified_nothing(tmp_path):
    folder = RunFolder.open(tmp_path)
    record = {"done": True, "max_steps": 40, "refine_end_step": 60}
    folder.write_record("distill", record)
    source = folder.stage("distill")
    (source / "refinements.json").write_text(json.dumps([{"step": 40, "accepted": True}]))
    later = load_config(CONFIG, SHORT | {"run.stages": ["grpo", "evaluate"], "refine.verify": True})
    sparsity = stage_sparsity(later, folder, "grpo", source)
    waiting = Waiting.after(sparsity.schedule, sparsity.earlier)
    assert (waiting.position, waiting.halvings) == (40, 0)


def test_a_stage_put_before_a_trained_one_is_refused_or_has_it_trained_again(tmp_path):
    """Else the later stage would keep the student that never saw the new one."""
    folder = RunFolder.open(tmp_path)
    stages = ["prune", "distill", "grpo", "evaluate"]
    config = load_config(CONFIG, SHORT | {"run.stages": stages})
    for stage in stages:
        inputs = stage_inputs(stage, config, folder)
        folder.write_record(stage, {"inputs": inputs, "done": True, "outputs": {}})
    settle(config, folder, "auto")
    more = {"on_policy.max_steps": 5, "run.stages": [*stages[:2], "on_policy", *stages[2:]]}
    longer = load_config(CONFIG, SHORT | more)
    with pytest.raises(UserError, match=r"^grpo: .*before on_policy -> after.*--resume redo"):
        settle(longer, folder, "auto")
    assert folder.is_done("grpo")
    settle(longer, folder, "redo")
    assert [stage for stage in stages if folder.record(stage)] == stages[:2]
    assert len(list((tmp_path / "old").glob("*/grpo/stage.json"))) == 1


def test_files_that_changed_under_the_same_path_are_another_input(tmp_path):
    task, folder = tmp_path / "task.jsonl", RunFolder.open(tmp_path / "run")
    task.write_text('{"prompt": "1", "answer": "2"}')
    config = load_config(CONFIG, SHORT | {"task.path": str(task)})
    for stage in ("prune", "distill"):
        inputs = stage_inputs(stage, config, folder)
        folder.write_record(stage, {"inputs": inputs, "done": True, "outputs": {}})
    settle(config, folder, "auto")
    task.write_text('{"prompt": "1", "answer": "33"}')
    with pytest.raises(UserError, match=r"^prune: .*files of task\.path: \{'task\.jsonl': "):
        settle(config, folder, "auto")


def test_a_model_measured_by_itself_is_measured_again_once_its_files_have_changed(tmp_path):
    student, folder = tmp_path / "student", RunFolder.open(tmp_path / "run")
    student.mkdir()
    (student / "config.json").write_text("{}")
    values = {"run.stages": ["evaluate"], "student.path": str(student)}
    config = load_config(CONFIG, values)
    inputs = stage_inputs("evaluate", config, folder)
    folder.write_record("evaluate", {"inputs": inputs, "done": True})
    assert is_current("evaluate", config, folder)
    (student / "config.json").write_text('{"a": 1}')
    assert not is_current("evaluate", config, folder)
    settle(config, folder, "auto")


@pytest.mark.parametrize("resume", ["auto", "redo"])
def test_another_model_is_not_measured_among_the_students_of_a_run(tmp_path, resume):
    folder = RunFolder.open(tmp_path)
    folder.write_record("prune", {"inputs": {"student.path": "bundled"}, "done": True})
    here = {"run.stages": ["evaluate"]}
    with pytest.raises(UserError, match=r"^student\.path: 'a/b': .*--output_dir"):
        settle(load_config(CONFIG, here | {"student.path": "a/b"}), folder, resume)
    settle(load_config(CONFIG, here), folder, resume)


def test_an_unfinished_stage_may_share_out_its_batch_in_another_way(tmp_path):
    folder = RunFolder.open(tmp_path)
    config = load_config(CONFIG, SHORT | {"run.stages": ["prune", "distill"]})
    split = {"distill.per_device_train_batch_size": 32, "distill.gradient_accumulation_steps": 4}
    other = load_config(CONFIG, SHORT | split | {"run.stages": ["prune", "distill"]})
    done = {"done": True, "outputs": {}}
    folder.write_record("prune", done | {"inputs": stage_inputs("prune", config, folder)})
    record = done | {"inputs": stage_inputs("distill", config, folder)}
    folder.write_record("distill", record | {"done": False})
    settle(other, folder, "auto")
    folder.write_record("distill", record)
    with pytest.raises(UserError, match=r"^distill: .*per_device_train_batch_size: 128 -> 32"):
        settle(other, folder, "auto")


def test_a_sweep_trains_all_students_for_equally_long_whatever_runs_measure():
    level = {"sweep.recover_levels": [0.9], "distill.max_steps": 5}
    plain = load_config("configs/sweep.yaml", level)
    measuring = load_config(
        "configs/sweep.yaml", level | {"evaluate.every_steps": 2, "evaluate.patience": 1}
    )
    label = next(iter(plain.sweep.rows))
    rows = [sweep._row_config(config, label, 0.9) for config in (plain, measuring)]
    assert rows[1].evaluate.every_steps is rows[1].evaluate.patience is None
    assert sweep._depends_on(rows[0], "models") == sweep._depends_on(rows[1], "models")


def test_cells_of_a_sweep_from_before_text_had_splits_are_not_stale():
    label = next(iter(load_config("configs/sweep.yaml", {}).sweep.rows))

    def hashed(**changes):
        config = load_config("configs/sweep.yaml", {f"evaluate.{k}": v for k, v in changes.items()})
        return sweep._depends_on(sweep._row_config(config, label, 0.9), "models")["evaluate"]

    known = ("completions", "max_new_tokens", "text_path", "text_seq_len", "text_stride")
    values = load_config("configs/sweep.yaml", {}).evaluate.model_dump()
    assert hashed() == hash_json({key: values[key] for key in known})
    assert hashed(zero_shot_batch_size=1, num_fewshot=5) == hashed()
    assert hashed(text_split="train") != hashed()


def test_measurements_come_back_and_lose_what_was_taken_otherwise():
    found = Measurements(
        accuracy=AccuracyResult(0.5, [True, False], ["a", "b"], 2),
        perplexity=Perplexity(2.0, 9, 5),
        agreement=Agreement(0.1, 0.9, 9),
        text_perplexity=Perplexity(7.0, 100, 16, stride=8),
        sampled=SampledAccuracy([1, 2], num_samples=4, temperature=1.0),
        zero_shot={"toy": TaskScore("acc", 0.5, None, 4)},
    )
    assert from_json(json.loads(json.dumps(to_json(found)))) == found
    bare = Measurements(accuracy=found.accuracy)
    assert from_json(json.loads(json.dumps(to_json(bare)))) == bare
    assert comparable(found, found) == found
    others = {
        "perplexity": {"num_tokens": 8},
        "agreement": {"num_tokens": 8},
        "text_perplexity": {"stride": 16},
        "sampled": {"num_samples": 3},
    }
    for kind, change in others.items():
        other = replace(found, **{kind: replace(getattr(found, kind), **change)})
        assert comparable(found, other) == replace(found, **{kind: None}), kind
    assert comparable(found, bare).text_perplexity is None
    shown = replace(found, zero_shot={"toy": TaskScore("acc", 0.5, None, 4, num_fewshot=5)})
    assert comparable(found, shown).zero_shot is None
    assert comparable(found, bare).zero_shot == found.zero_shot


def test_completions_whose_end_is_cut_are_counted(caplog):
    rollouts = [Rollout("p", "a", [1, 2], [3] * length, 1.0) for length in (1, 2, 3, 4)]
    warn_of_cut_ends(rollouts, None)
    warn_of_cut_ends(rollouts, 6)
    assert not caplog.records
    warn_of_cut_ends(rollouts, 4)
    assert "2 of 4 teacher completions have more than distill.max_length, 4 tokens" in caplog.text


@pytest.mark.parametrize(("scope", "warns"), [("matrix", True), ("model", False)])
def test_a_mask_that_keeps_zeros_a_student_came_with_is_warned_of(caplog, scope, warns):
    student = tiny(load_tokenizer("bundled"), 0)
    with torch.no_grad():
        next(iter(prunable_weights(student).values())).zero_()
    values = {"run.stages": ["prune"], "prune.method": "magnitude", "prune.scope": scope}
    masks = _prune(student, [], load_config(None, values | {"prune.redistribution": "none"}), 0.5)
    weights = prunable_weights(student)
    kept_zeros = sum(int((mask & (weights[name] == 0)).sum()) for name, mask in masks.items())
    assert (kept_zeros > 0) == warns
    assert ("the student came with zeros" in caplog.text) == warns


def test_a_mask_is_judged_by_the_weights_of_the_reward_mix():
    config = load_config(
        CONFIG,
        {
            "rewards.functions": ["format", "correctness"],
            "rewards.format_pattern": "a",
            "rewards.weights": [0.1, 2.0],
            "rewards.sparsity_weight": 0.3,
            "rewards.teacher_kl_weight": 0.4,
            "refine.tolerance": 0.02,
            "refine.verify": True,
        },
    )
    assert mask_reward(config) == MaskReward(
        correctness_weight=2.0, sparsity_weight=0.3, teacher_kl_weight=0.4, tolerance=0.02
    )


@pytest.mark.parametrize("verify", [False, True])
def test_what_masks_are_judged_by_is_an_input_only_where_they_are(tmp_path, verify):
    folder = RunFolder.open(tmp_path)
    config = load_config(CONFIG, {"refine.verify": verify})
    assert ("rewards.teacher_kl_weight" in stage_inputs("distill", config, folder)) == verify


def test_the_node_that_serves_vllm_is_no_input(tmp_path):
    folder = RunFolder.open(tmp_path)
    vllm = {"grpo.use_vllm": True, "grpo.vllm_mode": "server", "grpo.vllm_group_port": 20003}
    one, other = (
        load_config(CONFIG, SHORT | vllm | {"grpo.vllm_server_host": host, **port})
        for host, port in (("a", {}), ("b", {"grpo.vllm_server_port": 1}))
    )
    assert stage_inputs("grpo", one, folder) == stage_inputs("grpo", other, folder)


def test_the_checkpoint_to_go_on_from_is_one_that_this_run_will_read(tmp_path):
    config = load_config(CONFIG, SHORT | {"run.stages": ["prune", "distill"]})
    folder = RunFolder.open(tmp_path / "run")
    places = {
        "elsewhere/checkpoint-1": "is not a checkpoint of this run",
        "run/distill": "is not a checkpoint of this run",
        "run/prune/model": "is not a checkpoint of this run",
        "run/grpo/checkpoint-1": r"is a checkpoint of grpo, which is none of run\.stages",
        "run/distill/checkpoint-1": r"is not whole \(no manifest\.json",
    }
    for place, says in places.items():
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        with pytest.raises(UserError, match=rf"^--resume: .*{says}"):
            resumed_checkpoint(config, folder, str(tmp_path / place))
    checkpoint = tmp_path / "run" / "distill" / "checkpoint-1"
    write_manifest(checkpoint)
    assert resumed_checkpoint(config, folder, str(checkpoint)) == checkpoint
    folder.write_record("distill", {"done": True})
    with pytest.raises(UserError, match=r"^--resume: distill is done in"):
        resumed_checkpoint(config, folder, str(checkpoint))
