"""The watch over a run's log: each trouble found, healthy and noisy runs left alone, resumes."""

import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from transformers import TrainerControl, TrainerState
from trl import GRPOConfig

from pipeline.artifacts import MASK_FILE
from pipeline.errors import UserError
from pipeline.models.loading import load_tokenizer
from pipeline.models.prunable import prunable_weights
from pipeline.sparsity.masks import load_masks, save_masks
from pipeline.sparsity.movement import MovementRule
from pipeline.sparsity.refine import RefinementRule
from pipeline.training.checkpoint import newest_whole_checkpoint
from pipeline.training.grpo_trainer import TeacherGRPOTrainer
from pipeline.training.sparse_trainer import Sparsity
from pipeline.training.watch import Setup, Watch, WatchCallback, window_logs
from rewards.mix import build_rewards
from tests.unit.tiny_models import tiny

WINDOW = 5
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
HEALTHY = {
    "loss": 0.1,
    "grad_norm": 1.0,
    "sparsity": 0.9,
    "completions/mean_length": 20.0,
    "completions/clipped_ratio": 0.1,
    "rewards/correctness/mean": 0.6,
    "rewards/correctness/std": 0.49,
    "reward": 0.6,
    "reward_std": 0.49,
    "frac_reward_zero_std": 0.3,
    "teacher_kl": 0.25,
}
DEAD = {"frac_reward_zero_std": 1.0, "reward": 0.0, "rewards/correctness/mean": 0.0}


def history(*parts):
    """Logs at steps 10, 20, ...: for each part (number of logs, what differs from healthy)."""
    logs = [HEALTHY | changes for number, changes in parts for _ in range(number)]
    return [log | {"step": 10 * (i + 1)} for i, log in enumerate(logs)]


def reward(values, **more):
    return [(1, {"reward": float(value), **more}) for value in values]


def watched(logs, teacher_kl_weight=0.0, window=WINDOW, **arguments):
    watch = Watch(Setup("grpo", SimpleNamespace(**arguments), teacher_kl_weight), window)
    for log in logs:
        watch.read(log)
    return watch


def found(logs, **kwargs):
    return [(finding.kind, finding.step) for finding in watched(logs, **kwargs).findings]


def test_a_window_covers_five_logs_and_twenty_steps():
    assert [window_logs(steps) for steps in (1, 3, 4, 10, 500)] == [20, 7, 5, 5, 5]


def test_a_healthy_run_that_learns_has_no_finding():
    rising = np.linspace(0.1, 1.0, 60)
    assert found(history(*reward(rising))) == []


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_found_once_for_each_time_it_comes(loss):
    logs = history((3, {}), (4, {"loss": loss}), (2, {}), (1, {"loss": loss}))
    assert found(logs) == [("not_finite", 40), ("not_finite", 100)]


def test_skipped_steps_stand_for_a_loss_that_transformers_keeps_out_of_the_log():
    counts = [0, 1, 1, 1, 2, 2, 2, 3, 3, 4, 5]  # three in five logs only at the end
    logs = history(*[(1, {"skipped_steps": count} if count else {}) for count in counts])
    assert found(logs) == [("not_finite", 110)]


def test_the_count_of_skipped_steps_may_start_again_after_a_resume():
    logs = history((5, {"skipped_steps": 2}), (5, {}), (5, {"skipped_steps": 2}))
    assert found(logs) == []
    logs = history((5, {"skipped_steps": 2}), (1, {}), (1, {"skipped_steps": 3}))
    assert found(logs) == [("not_finite", 70)]


def test_dead_batches_need_a_whole_window_in_a_row():
    assert found(history((WINDOW - 1, DEAD), (1, {}), (WINDOW - 1, DEAD))) == []
    assert found(history((WINDOW + 3, DEAD))) == [("dead", 10 * WINDOW)]
    again = history((WINDOW + 3, DEAD), (1, {}), (WINDOW, DEAD))
    assert found(again) == [("dead", 50), ("dead", 140)]


def test_equal_rewards_because_all_is_right_are_no_trouble():
    solved = {"frac_reward_zero_std": 1.0, "reward": 1.0, "rewards/correctness/mean": 1.0}
    assert found(history((20, solved))) == []
    assert found(history((20, solved), (WINDOW, DEAD)))[-1] == ("dead", 250)


def test_dead_advice_names_the_keys_and_says_when_the_teacher_still_teaches():
    alone = watched(history((WINDOW, DEAD)), temperature=1.0, num_generations=8).findings[0]
    assert "RL has no gradient" in alone.text
    for words in (
        "distill.max_steps",
        "refine.start_sparsity",
        "rewards.teacher_kl_weight above 0 (0.5)",
        "grpo.temperature (now 1.0)",
        "grpo.num_generations (now 8)",
    ):
        assert words in alone.text
    assert alone.stops
    taught = watched(history((WINDOW, DEAD)), teacher_kl_weight=0.5).findings[0]
    assert "only the teacher term still teaches" in taught.text
    assert "rewards.teacher_kl_weight 0.5" in taught.text
    assert "0.25 nats" in taught.text
    assert not taught.stops


def test_collapse_is_found_by_hand():
    # windows of 5: best 0.6; two low logs give 0.6 - 2 * 0.1 = 0.4, three 0.3, four 0.2 < 0.6 / 2
    logs = history((12, {}), (6, {"reward": 0.1}))
    finding = watched(logs, learning_rate=1e-4).findings[0]
    assert (finding.kind, finding.step) == ("collapse", 160)
    assert "reward is 0.2 over the last 5 logs, at best it was 0.6 (step 50)" in finding.text
    assert "grpo.learning_rate (now 0.0001)" in finding.text
    assert "refine.end_step" not in finding.text


def test_collapse_under_a_rising_sparsity_names_the_schedule():
    logs = history((12, {"sparsity": 0.7}), (6, {"reward": 0.1, "sparsity": 0.95}))
    text = watched(logs).findings[0].text
    assert "a later refine.end_step (sparsity rose from 0.7 to 0.95)" in text


def test_right_answers_that_vanish_under_a_steady_reward_are_a_collapse():
    fallen = {"rewards/correctness/mean": 0.0, "rewards/correctness/std": 0.0}
    watch = watched(history((12, {}), (6, fallen)))
    assert watch.counts == {"collapse": 1}
    assert "rewards/correctness/mean is" in watch.findings[0].text


def test_collapse_counts_again_only_after_the_reward_came_back():
    low = {"reward": 0.1}
    # 0.4 is above half of 0.6, but a finding is over only above three quarters of it
    assert len(found(history((12, {}), (6, low), (9, {"reward": 0.4}), (6, low)))) == 1
    assert len(found(history((12, {}), (6, low), (9, {}), (6, low)))) == 2


@pytest.mark.parametrize(
    ("before", "after", "std", "collapsed"),
    [
        (0.6, 0.35, 0.5, False),  # less than half is lost
        (0.02, 0.0, 0.14, False),  # all is lost, but 0.02 < 0.14 / 4
        (0.2, 0.0, 0.4, True),
        (-1.0, -1.4, 0.1, False),  # a penalty: half of |-1| is 0.5
        (-1.0, -1.6, 0.1, True),
        (0.0, 0.0, 0.0, False),
    ],
)
def test_collapse_needs_a_relative_and_an_absolute_fall(before, after, std, collapsed):
    logs = history((15, {"reward": before, "reward_std": std}), (40, {"reward": after}))
    assert bool(found(logs)) is collapsed


@pytest.mark.parametrize("window", [5, 20])
def test_collapse_is_judged_once_two_windows_share_no_log(window):
    logs = history((window, {}), (window, {"reward": 0.0}))
    assert found(logs[:-1], window=window) == []
    assert found(logs, window=window) == [("collapse", 20 * window)]


def drifting(draws, number, memory):
    """Rewards of mean 0.5 and deviation 0.1, each `memory` times the one before and a draw."""
    values = np.zeros(number)
    for i in range(1, number):
        values[i] = memory * values[i - 1] + draws.normal(0.0, 0.1 * math.sqrt(1 - memory**2))
    return 0.5 + values


@pytest.mark.parametrize(
    ("window", "right", "rewards"),
    [
        (5, 0.5, lambda draws: draws.binomial(128, 0.5, 800) / 128),
        (5, 0.02, lambda draws: draws.binomial(64, 0.02, 800) / 64),
        (20, 0.1, lambda draws: draws.binomial(8, 0.1, 800) / 8),
        (5, 0.5, lambda draws: drifting(draws, 800, 0.3)),
    ],
)
def test_stationary_noise_raises_no_alarm(window, right, rewards):
    """Logs independent of each other: of 100 runs of 1,000 logs at most two have a false alarm.

    Logs that hang together are a reward that comes and goes, which can be reported.
    """
    draws, alarms = np.random.default_rng(0), 0
    for _ in range(12):
        values = rewards(draws)
        lengths = draws.exponential(20.0, size=(len(values), 16)).mean(1)
        logs = [
            {
                "reward": float(value),
                "reward_std": math.sqrt(right * (1 - right)),
                "completions/mean_length": float(length),
                "completions/clipped_ratio": float(value),
            }
            for value, length in zip(values, lengths, strict=True)
        ]
        alarms += bool(found(logs, window=window))
    assert alarms == 0


@pytest.mark.parametrize(("window", "within"), [(5, 10), (20, 20)])
def test_a_true_collapse_is_found_in_the_same_noise(window, within):
    draws = np.random.default_rng(1)
    for _ in range(10):
        right = np.r_[np.linspace(0.1, 0.7, 60), np.full(60, 0.7), np.full(40, 0.1)]
        logs = history(*reward(draws.binomial(64, right) / 64, reward_std=0.45))
        for log in logs:
            del log["rewards/correctness/mean"]
        kinds = found(logs, window=window)
        assert [kind for kind, _ in kinds] == ["collapse"]
        assert 1200 < kinds[0][1] <= 1200 + 10 * within


def test_length_blow_up_is_found_by_hand_with_advice():
    # windows of 5: first 20; at 60 tokens three logs give 44 > 2 * 20, less noise: the rise itself
    logs = history((12, {}), (12, {"completions/mean_length": 60.0}))
    watch = watched(logs, mask_truncated_completions=False, max_completion_length=256)
    assert watch.counts == {"longer": 1}
    assert 120 < watch.findings[0].step <= 200
    assert "20 at the start" in watch.findings[0].text
    assert "grpo.mask_truncated_completions (now False)" in watch.findings[0].text
    assert "grpo.max_completion_length (now 256)" in watch.findings[0].text


def test_longer_completions_that_earn_more_are_learning():
    longer = {"completions/mean_length": 60.0}
    assert found(history((12, {}), (20, longer | {"reward": 0.9}))) == []
    assert found(history((12, {}), (20, {"completions/mean_length": 35.0}))) == []


def test_completions_cut_at_the_limit():
    cut = {"completions/clipped_ratio": 0.97, "completions/mean_terminated_length": 0.0}
    watch = watched(history((WINDOW, cut)), max_completion_length=8)
    assert watch.counts == {"clipped": 1}
    assert "97% of the completions are cut at grpo.max_completion_length (now 8)" in (
        watch.findings[0].text
    )
    assert found(history((WINDOW - 1, cut))) == []
    assert found(history((20, cut | {"completions/clipped_ratio": 0.94}))) == []


def test_two_findings_in_one_log():
    both = DEAD | {"completions/clipped_ratio": 1.0}
    assert found(history((WINDOW, both))) == [("dead", 50), ("clipped", 50)]
    watch = watched(history((WINDOW, both), (3, {"completions/clipped_ratio": 1.0})))
    assert set(watch.open) == {"clipped"}


@pytest.mark.parametrize("missing", [*HEALTHY, None])
def test_metrics_that_are_missing_or_none_are_not_judged(missing):
    logs = history((12, {}), (12, DEAD | {"completions/clipped_ratio": 1.0, "loss": math.nan}))
    gone = [{k: v for k, v in log.items() if missing not in (k, None)} for log in logs]
    none = [{k: None if missing in (k, None) else v for k, v in log.items()} for log in logs]
    expected = {} if missing is None else None
    for changed in (gone if missing else [{}] * 12, none):
        counts = watched(changed, teacher_kl_weight=0.5).counts
        assert set(counts) <= {"not_finite", "dead", "collapse", "clipped"}
        assert expected is None or counts == expected


def test_logs_between_that_lack_a_metric_change_nothing():
    # an evaluation's log, and the last one of a training
    others = ({"eval_reward": 0.6, "step": 5}, {"train_loss": 0.1, "train_runtime": 9.0, "step": 5})
    logs = history((12, {}), (12, DEAD))
    mixed = [entry for log in logs for entry in (log, *others)]
    assert found(mixed) == found(logs) != []


class Loop:
    """The calls that transformers' training loop makes, with its own state."""

    def __init__(self, on_trouble, logs=(), teacher_kl_weight=0.0, **arguments):
        values = {"output_dir": "runs/x/grpo", "logging_steps": 10, "bf16": False, "use_cpu": True}
        self.args = GRPOConfig(**(values | arguments))
        self.state = TrainerState(log_history=list(logs), logging_steps=10)
        self.control = TrainerControl()
        self.callback = WatchCallback("grpo", on_trouble, teacher_kl_weight)
        self.callback.on_log(self.args, self.state, self.control, logs={"eval_loss": 1.0})
        self.callback.on_train_begin(self.args, self.state, self.control)

    def log(self, entry):
        self.state.global_step = entry["step"]
        self.callback.on_log(self.args, self.state, self.control, logs=dict(entry))

    def feed(self, logs):
        """Returns the step that raised, and the message."""
        for entry in logs:
            self.log(entry)
            try:
                self.callback.on_step_begin(self.args, self.state, self.control)
            except UserError as error:
                return entry["step"], str(error)
        return None


def test_go_on_warns_once_and_sums_up(caplog):
    loop = Loop("go_on")
    with caplog.at_level(logging.WARNING, logger="pipeline.training.watch"):
        assert loop.feed(history((12, {}), (20, DEAD))) is None
        loop.callback.on_train_end(loop.args, loop.state, loop.control)
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(":")[:3] for line in lines[:2]] == [
        ["grpo", " step 160", " reward collapse"],
        ["grpo", " step 170", " dead batches"],
    ]
    assert lines[2:] == ["grpo: trouble seen while training: collapse 1, dead 1"]


def test_stop_raises_at_the_next_step_with_the_way_on():
    loop = Loop("stop")
    for entry in history((WINDOW, DEAD)):
        loop.log(entry)  # nothing is raised here: a checkpoint may be due
    with pytest.raises(UserError) as raised:
        loop.callback.on_step_begin(loop.args, loop.state, loop.control)
    message = str(raised.value)
    assert message.startswith("grpo.on_trouble: stop: step 50: dead batches")
    assert "runs/x/grpo are intact" in message
    assert "set grpo.on_trouble to go_on" in message


def test_stop_waits_while_the_teacher_still_teaches():
    loop = Loop("stop", teacher_kl_weight=0.5)
    assert loop.feed(history((20, DEAD))) is None
    assert loop.callback.watch.counts == {"dead": 1}


def test_a_resume_rebuilds_what_a_straight_run_knows(caplog):
    logs = history((3, {"loss": math.nan}), (12, {}), (14, DEAD | {"completions/clipped_ratio": 1}))
    straight = Loop("go_on")
    straight.feed(logs)
    assert set(straight.callback.watch.counts) == {"not_finite", "collapse", "dead", "clipped"}
    for cut in range(len(logs) + 1):
        caplog.clear()
        resumed = Loop("go_on", logs[:cut])
        assert caplog.records == []
        resumed.feed(logs[cut:])
        assert resumed.callback.watch.findings == straight.callback.watch.findings


def test_a_stopped_run_goes_on_and_stops_again_only_if_a_window_did_not_help():
    logs = history((40, DEAD))
    assert Loop("stop").feed(logs)[0] == 50
    assert (
        Loop("stop", logs[:3]).feed(logs[3:])[0] == 50
    )  # the checkpoint is older than the trouble
    assert Loop("stop", logs[:5]).feed(logs[5:])[0] == 100
    cured = history((5, DEAD), (3, {}), (9, DEAD))
    assert Loop("stop", cured[:5]).feed(cured[5:])[0] == 130
    assert Loop("go_on", logs[:5]).feed(logs[5:]) is None


def never_right(completion, answer):
    return 0.0


def trainer(tokenizer, out, on_trouble, **arguments):
    values = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 2,
        "max_steps": 26,
        "logging_steps": 4,
        "save_steps": 10,
        "beta": 0.0,
        "disable_tqdm": True,
    }
    model = tiny(tokenizer, 0)
    source = out.parent / "prune"
    if not source.exists():
        source.mkdir()
        keep = {n: w.detach().abs() > 0.1 for n, w in prunable_weights(model).items()}
        save_masks(source / MASK_FILE, keep)
    functions, _ = build_rewards(["correctness"], None, never_right)
    made = TeacherGRPOTrainer(
        model=model,
        reward_funcs=functions,
        args=GRPOConfig(**CPU, **(values | arguments)),
        train_dataset=Dataset.from_dict({"prompt": ["12@35="] * 64, "answer": ["never"] * 64}),
        processing_class=tokenizer,
    )
    sparsity = Sparsity(
        source=source,
        schedule=None,
        rule=RefinementRule(
            scope="matrix", score="magnitude", movement_weight=0.5, protect_steps=0, min_density=0.0
        ),
        movement=MovementRule(half_life_steps=5.0),
        first_step=0,
        stage="grpo",
    )
    callback = WatchCallback("grpo", on_trouble)
    made.add_callback(callback)
    return made, sparsity, callback


def test_a_dead_run_through_trl_stops_and_goes_on_from_its_checkpoint(tmp_path):
    tokenizer, out = load_tokenizer("bundled"), tmp_path / "grpo"
    made, sparsity, callback = trainer(tokenizer, out, "stop")
    made.add_sparsity(sparsity)
    with pytest.raises(UserError, match=r"grpo.on_trouble: stop: step 20: dead batches"):
        made.train()
    assert made.state.global_step == 20
    read = {"loss", "reward", "reward_std", "frac_reward_zero_std", "rewards/correctness/mean"}
    read |= {"rewards/correctness/std", "completions/mean_length", "completions/clipped_ratio"}
    assert read | {"sparsity"} <= made.state.log_history[0].keys()

    checkpoint = newest_whole_checkpoint(out)
    assert checkpoint == out / "checkpoint-20"  # saved with the log that stopped the run
    made, sparsity, callback = trainer(tokenizer, out, "go_on", temperature=1.5)
    sparsity.resume(checkpoint)
    made.add_sparsity(sparsity)
    made.train(resume_from_checkpoint=str(checkpoint))
    assert made.state.global_step == 26
    assert callback.watch.counts["dead"] == 1
    masks = load_masks(tmp_path / "prune" / MASK_FILE)
    assert all(not w[~masks[n]].any() for n, w in prunable_weights(made.model).items())
