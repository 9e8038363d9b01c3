"""One progress bar a training stage: steps, time left, and the few numbers to watch."""

from transformers import ProgressCallback

WATCHED = (
    "loss",
    "kl",
    "reward",
    "frac_reward_zero_std",
    "teacher_kl",
    "sparsity",
    "heldout_accuracy",
)


class StageProgress(ProgressCallback):
    """transformers' bar, with the latest log on it instead of printed below it."""

    def __init__(self, stage: str):
        """`stage`: the name on the bar."""
        super().__init__()
        self.stage = stage
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        """Opens the bar at the step the stage resumes from."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.stage)
            self.training_bar.initial = self.training_bar.n = state.global_step
        self.current_step = state.global_step

    def close(self) -> None:
        """Ends the bar's line when training was broken off."""
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Shows what is watched."""
        if self.training_bar is not None:
            self.shown |= {key: f"{logs[key]:.3g}" for key in WATCHED if key in logs}
            self.training_bar.set_postfix(self.shown)
