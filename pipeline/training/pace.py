"""What a training stage costs, said once its first ten steps are known.

    seconds a step = (end of step 10 - end of step 1) / 9        steps of this process
    hours          = ranks x seconds a step x steps of the stage / 3600

The first step is left out: it compiles and allocates. Tokens are those that go through the student,
prompts and completions, over all ranks. Left out: the stages behind this one, and what measuring,
saving and refining cost where they fall behind the tenth step.
"""

import logging
import time

import torch
from transformers import TrainerCallback

AFTER_STEPS = 10

logger = logging.getLogger(__name__)


class Pace(TrainerCallback):
    """Logs time left, GPU-hours and tokens a second after `AFTER_STEPS` steps."""

    def __init__(self, stage: str, num_ranks: int):
        """`stage`: the name in the log. `num_ranks`: processes that train."""
        self.stage = stage
        self.num_ranks = num_ranks
        self.steps = 0
        self.started = 0.0
        self.tokens = 0

    def on_step_end(self, args, state, control, **kwargs):
        """Counts the steps of this process."""
        self.steps += 1
        if self.steps == 1:
            self.started, self.tokens = time.monotonic(), state.num_input_tokens_seen
        if self.steps == AFTER_STEPS:
            seconds = time.monotonic() - self.started
            tokens = state.num_input_tokens_seen - self.tokens
            logger.info("%s: %s", self.stage, self.describe(seconds, tokens, state))

    def describe(self, seconds: float, tokens: int, state) -> str:
        """One sentence.

        Args:
            seconds: Between the ends of the first and the last step counted.
            tokens: Seen meanwhile; 0 where nobody counts them.
            state: The trainer's.
        """
        each = seconds / (AFTER_STEPS - 1)
        unit = "process" if torch.accelerator.current_accelerator() is None else "GPU"
        hours = self.num_ranks * each * state.max_steps / 3600
        text = (
            f"{each:.3g} s a step, {duration(each * (state.max_steps - state.global_step))} left, "
            f"{hours:.3g} {unit}-hours for {state.max_steps} steps"
        )
        return f"{text}, {tokens / seconds:,.0f} tokens a second" if tokens else text


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
