"""Trouble in a long run, seen in what the trainer logs: said once, with advice, and counted.

A window is W logs: 5, or as many as 20 optimizer steps make. The findings, by kind:

    not_finite  the logged loss is NaN or infinite, or a window has 3 skipped steps
    dead        W logs in a row in which all groups had equal rewards: GRPO's advantages are 0
    collapse    the mean reward, or the share of right answers, has fallen since its best window by
                more than half of |best|, a quarter of the completions' standard deviation then,
                and 6 standard errors
    longer      mean completion length is above twice that of the first window, by more than 6
                standard errors, and the reward has not risen by 3
    clipped     95 % of a window's completions end at the length limit, not at an end token

The standard error of the difference of two windows is the larger of two. From single logs: half the
mean square of the differences between neighbours, over 8 windows (von Neumann, Kent, Bellinson and
Hart 1941), times 2 / W. From 10 windows on also from every W-th window mean: the median of
|a - 2 b + c| for three in a row, as a normal deviation, / sqrt(3); it sees noise that lasts longer
than a log. Neither takes a trend for noise. It takes six of them, because the best of many windows
is a lucky one. A finding is over when half of its limit holds, and only then can come again.

TRL gathers what it logs over all ranks and calls `on_log` on each of them, so all ranks judge
alike. Under `stop` they agree all the same, and raise when the next step begins: a checkpoint that
is due with the log has been saved by then. None is saved because of the trouble, it would push out
an older and better one. After a resume the log's history is judged again, silently, and a finding
that was open stops the run only if it is still there a window later.

Left out: what no metric shows. transformers keeps a NaN loss out of the log
(`logging_nan_inf_filter`; without it every later loss would be NaN too), so its trace is the steps
that `skipped_steps.py` skips. Under `scale_rewards: batch` TRL measures the spread of the whole
batch, and dead groups beside live ones do not show.
"""

import logging
import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from transformers import TrainerCallback

from pipeline.errors import UserError
from pipeline.ranks import raise_together

WINDOW_LOGS, WINDOW_STEPS = 5, 20
NOISE_WINDOWS, WINDOWS_APART = 8, 10
DEVIATION = 1.4826
"""Standard deviation of a normal distribution with median 0 / median of its absolute values."""
SKIPPED_STEPS = 3
FALL, FALL_IN_DEVIATIONS = 0.5, 0.25
GROWTH = 2.0
CLIPPED = 0.95
SURE, LIKELY = 6.0, 3.0
"""Standard errors that an alarm takes, and that excuse one."""
SOLVED = 0.99
"""Share of right answers from which equal rewards mean a solved task."""
CORRECT = "rewards/correctness/mean"

Log = Mapping[str, Any]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Finding:
    """One occurrence of a trouble."""

    kind: str
    """not_finite, dead, collapse, longer or clipped."""
    step: int
    """Optimizer step of the log that showed it."""
    text: str
    """What is wrong, and which keys to set."""
    stops: bool
    """Whether `on_trouble: stop` stops for it: not while the teacher term still teaches."""


@dataclass(frozen=True)
class Setup:
    """What the advice has to know of the run."""

    stage: str
    arguments: Any
    """TRL's arguments of the stage; any attribute may be missing."""
    teacher_kl_weight: float = 0.0
    """Weight of the teacher's term outside the rewards; 0: there is none."""

    def key(self, name: str) -> str:
        """A config key of the stage with its present value, where there is one."""
        value = getattr(self.arguments, name, None)
        return f"{self.stage}.{name}" + ("" if value is None else f" (now {value})")


def window_logs(logging_steps: int) -> int:
    """Logs in a window, when one comes every `logging_steps` optimizer steps."""
    return max(WINDOW_LOGS, math.ceil(WINDOW_STEPS / logging_steps))


class Watch:
    """Judges one log after the other."""

    def __init__(self, setup: Setup, window: int):
        """`window`: logs in a window."""
        self.setup = setup
        self.window = window
        self.findings: list[Finding] = []
        self.open: dict[str, Finding] = {}
        self._rules = [rule(window) for rule in (_NotFinite, _Dead, _Collapse, _Longer, _Clipped)]

    @property
    def counts(self) -> Counter[str]:
        """Findings so far, by kind."""
        return Counter(finding.kind for finding in self.findings)

    def read(self, log: Log) -> list[Finding]:
        """Judges a log of the trainer. Returns what is new; what a log does not say stays as is."""
        new = []
        for rule in self._rules:
            seen = rule.sees(log, rule.kind in self.open)
            if seen is False:
                self.open.pop(rule.kind, None)
            elif seen and rule.kind not in self.open:
                stops = rule.kind != "dead" or self.setup.teacher_kl_weight == 0
                step = log.get("step", 0)
                finding = Finding(rule.kind, step, rule.text(self.setup), stops)
                self.open[rule.kind] = finding
                new.append(finding)
        self.findings += new
        return new


class WatchCallback(TrainerCallback):
    """Feeds the trainer's logs to a `Watch`, warns, and stops the run if so configured."""

    watch: Watch | None = None
    """None until training begins."""

    def __init__(
        self, stage: str, on_trouble: Literal["go_on", "stop"], teacher_kl_weight: float = 0.0
    ):
        """Adds to any trainer; one whose metrics are missing is not judged by them.

        Args:
            stage: Section of the config that the advice names.
            on_trouble: Warn only, or raise UserError on every rank as well.
            teacher_kl_weight: Of the teacher's term outside the rewards; 0 where there is none.
        """
        self.stage = stage
        self.on_trouble = on_trouble
        self.teacher_kl_weight = teacher_kl_weight

    def on_train_begin(self, args, state, control, **kwargs):
        """Judges again what the run logged before it was resumed, silently."""
        by_steps = args.logging_strategy == "steps"
        window = window_logs(state.logging_steps) if by_steps else WINDOW_LOGS
        self.watch = Watch(Setup(self.stage, args, self.teacher_kl_weight), window)
        for log in state.log_history:
            self.watch.read(log)
        self._inherited = list(self.watch.open.values())
        self._logs = 0
        self._judged = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Judges the log and warns of what is new."""
        if self.watch is None:  # an evaluation by itself
            return
        for finding in self.watch.read({**logs, "step": state.global_step}):
            logger.warning("%s: step %d: %s", self.stage, finding.step, finding.text)
        self._logs += "loss" in logs
        self._judged = True

    def on_step_begin(self, args, state, control, **kwargs):
        """Stops the run if the last log calls for it, on all ranks together.

        Raises:
            UserError: Under `stop`; the checkpoints stay as they are.
        """
        if self.on_trouble == "stop" and self._judged:
            self._judged = False
            raise_together(self._stop(args.output_dir))

    def on_train_end(self, args, state, control, **kwargs):
        """Says how often there was trouble."""
        if self.watch.findings:
            kinds = ", ".join(f"{kind} {count}" for kind, count in self.watch.counts.items())
            logger.warning("%s: trouble seen while training: %s", self.stage, kinds)

    def _stop(self, output_dir: str) -> UserError | None:
        patient = self._logs < self.watch.window
        reasons = [
            f"step {finding.step}: {finding.text}"
            for finding in self.watch.open.values()
            if finding.stops and not (patient and finding in self._inherited)
        ]
        if not reasons:
            return None
        return UserError(
            f"{self.stage}.on_trouble: stop: " + "\n".join(reasons) + f"\nThe checkpoints in "
            f"{output_dir} are intact; set {self.stage}.on_trouble to go_on to train on from the "
            "newest, or change the keys above and --resume redo"
        )


def _number(log: Log, key: str) -> float | None:
    """A logged value; None where there is no finite one."""
    value = log.get(key)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


class _Track:
    """Window means of one metric: the first, the best, the present one."""

    def __init__(self, key: str, window: int):
        self.key = key
        self.window = window
        self.windows = 0
        self.best = -math.inf
        self._values: deque[float] = deque(maxlen=NOISE_WINDOWS * window)
        self._apart: list[float] = []

    def add(self, log: Log) -> bool:
        """Whether the log has the metric and the window is full."""
        value = _number(log, self.key)
        if value is None:
            return False
        self._values.append(value)
        if len(self._values) < self.window:
            return False
        self.now = sum(list(self._values)[-self.window :]) / self.window
        if self.windows == 0:
            self.first = self.now
        if self.windows % self.window == 0:
            self._apart.append(self.now)
        if self.now > self.best:
            self.best, self.best_log = self.now, log
        self.windows += 1
        return True

    def error(self) -> float:
        """Standard error of the difference between two windows."""
        squares = [(b - a) ** 2 for a, b in pairwise(self._values)]
        error = math.sqrt(sum(squares) / len(squares) / self.window)
        if len(self._apart) >= WINDOWS_APART:
            before, here, after = self._apart[:-2], self._apart[1:-1], self._apart[2:]
            bends = [abs(a - 2 * b + c) for a, b, c in zip(before, here, after, strict=True)]
            error = max(error, DEVIATION * median(bends) / math.sqrt(3))
        return error


class _NotFinite:
    kind = "not_finite"

    def __init__(self, window: int):
        self._skipped: deque[float] = deque(maxlen=window)
        self._count = 0.0

    def sees(self, log: Log, is_open: bool) -> bool | None:
        if not isinstance(log.get("loss"), (int, float)):
            return None
        count = _number(log, "skipped_steps") or 0.0  # from 0 again when a run resumes
        self._skipped.append(count - self._count if count >= self._count else count)
        self._count, self._loss = count, log["loss"]
        return not math.isfinite(self._loss) or sum(self._skipped) >= SKIPPED_STEPS

    def text(self, setup: Setup) -> str:
        return (
            f"numbers that are not finite (loss {self._loss:.3g}; {sum(self._skipped):.0f} steps "
            f"skipped in the last {len(self._skipped)} logs); set a lower "
            f"{setup.key('learning_rate')} or {setup.key('max_grad_norm')}"
        )


class _Dead:
    kind = "dead"

    def __init__(self, window: int):
        self.window = window
        self._in_a_row = 0

    def sees(self, log: Log, is_open: bool) -> bool | None:
        dead = _number(log, "frac_reward_zero_std")
        if dead is None:
            return None
        solved = (_number(log, CORRECT) or 0.0) >= SOLVED
        self._in_a_row = self._in_a_row + 1 if dead >= 1 and not solved else 0
        self._log = log
        return self._in_a_row >= self.window

    def text(self, setup: Setup) -> str:
        reward, distance = _number(self._log, "reward"), _number(self._log, "teacher_kl")
        mean = "" if reward is None else f" (mean reward {reward:.3g})"
        effect, teacher = "RL has no gradient", " set rewards.teacher_kl_weight above 0 (0.5),"
        if setup.teacher_kl_weight > 0:
            left = "" if distance is None else f", teacher_kl {distance:.3g} nats per token"
            weight = f"rewards.teacher_kl_weight {setup.teacher_kl_weight:g}"
            effect, teacher = f"only the teacher term still teaches ({weight}{left})", ""
        return (
            f"dead batches: all groups of {self.window} logs in a row had equal rewards{mean}, "
            f"{effect};{teacher} distil longer (distill.max_steps), or set a lower "
            f"refine.start_sparsity, a higher {setup.key('temperature')} or "
            f"{setup.key('num_generations')}"
        )


class _Collapse:
    kind = "collapse"

    def __init__(self, window: int):
        self._levels = [_Track("reward", window), _Track(CORRECT, window)]

    def sees(self, log: Log, is_open: bool) -> bool | None:
        self._log = log
        full = [level for level in self._levels if level.add(log)]
        judged = [level for level in full if level.windows > level.window]  # two windows apart
        self._fallen = [level for level in judged if self._has_fallen(level, is_open)]
        return bool(self._fallen) if judged else None

    def _has_fallen(self, level: _Track, is_open: bool) -> bool:
        drop = (level.best - level.now) * (2 if is_open else 1)
        spread_key = "reward_std" if level.key == "reward" else CORRECT.replace("mean", "std")
        spread = _number(level.best_log, spread_key) or 0.0
        limit = max(FALL * abs(level.best), FALL_IN_DEVIATIONS * spread)
        return drop > limit and drop > SURE * level.error()

    def text(self, setup: Setup) -> str:
        level = self._fallen[0]
        then, now = _number(level.best_log, "sparsity"), _number(self._log, "sparsity")
        slower = ""
        if then is not None and now is not None and now > then:
            slower = f"a later refine.end_step (sparsity rose from {then:.3g} to {now:.3g}), "
        step = level.best_log.get("step")
        return (
            f"reward collapse: {level.key} is {level.now:.3g} over the last {level.window} logs, "
            f"at best it was {level.best:.3g} (step {step}); set {slower}a lower "
            f"{setup.key('learning_rate')}, or a higher {setup.key('beta')} or "
            f"rewards.teacher_kl_weight (now {setup.teacher_kl_weight:g})"
        )


class _Longer:
    kind = "longer"

    def __init__(self, window: int):
        self._length = _Track("completions/mean_length", window)
        self._reward = _Track("reward", window)

    def sees(self, log: Log, is_open: bool) -> bool | None:
        reward, length = self._reward, self._length
        rose = reward.add(log) and reward.now - reward.first > LIKELY * reward.error()
        if not length.add(log):
            return None
        growth = (length.now - length.first) * (2 if is_open else 1)
        limit = max((GROWTH - 1) * length.first, SURE * length.error())
        return growth > limit and not rose

    def text(self, setup: Setup) -> str:
        length = self._length
        return (
            f"length blow-up: completions have {length.now:.3g} tokens, {length.first:.3g} at the "
            f"start, for no more reward; set {setup.key('mask_truncated_completions')} to true, a "
            f"lower {setup.key('max_completion_length')}, or a reward for brevity in "
            "rewards.functions"
        )


class _Clipped:
    kind = "clipped"

    def __init__(self, window: int):
        self._clipped = _Track("completions/clipped_ratio", window)

    def sees(self, log: Log, is_open: bool) -> bool | None:
        if not self._clipped.add(log):
            return None
        return 1 - self._clipped.now <= (1 - CLIPPED) * (2 if is_open else 1)

    def text(self, setup: Setup) -> str:
        return (
            f"no end: {self._clipped.now:.0%} of the completions are cut at "
            f"{setup.key('max_completion_length')}; distil longer (distill.max_steps), raise it "
            "if answers need more, or set a reward for brevity in rewards.functions"
        )
