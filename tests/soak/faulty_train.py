"""launch/train.py to which something happens at one point, the same at each start.

    FAULT=grpo:3:manifest:launcher:KILL accelerate launch tests/soak/faulty_train.py --config ...

FAULT is STAGE:STEP:PHASE:WHOM:SIGNAL. STEP is 0 outside training. PHASE is `begin` or `end` of a
stage, `step`, when an optimizer step is over, or how far the checkpoint of that step has come:
`weights`, `optimizer`, `sparsity`, `manifest`, `rename`, `rotate`. WHOM is `rank0`, `rank1`, the
`launcher` alone, or the `group` of launcher and ranks. SIGNAL is KILL, TERM, USR1 or INT; FULL
fills the disk instead, for as long as `filler` lies beside the run folder; WAIT waits until
`go_on` lies there.
"""

import contextlib
import os
import signal
import sys
import time
from functools import wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from launch import train


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status of `launch/train.py`, if it comes to that."""
    set_trap(*os.environ["FAULT"].split(":"))
    return train.main(argv)


def set_trap(stage: str, step: str, phase: str, whom: str, name: str) -> None:
    """Wraps what passes the point."""
    from transformers import Trainer

    from pipeline import run
    from pipeline.training import checkpoint, sparse_trainer
    from pipeline.training.step_agreement import StepAgreement

    def fire() -> None:
        if whom.startswith("rank") and whom != f"rank{os.environ.get('RANK', 0)}":
            return
        if not whom.startswith("rank") and os.environ.get("RANK", "0") != "0":
            return
        print(f"fault: {os.environ['FAULT']}", file=sys.stderr, flush=True)
        beside = Path(sys.argv[sys.argv.index("--output_dir") + 1]).parent
        if name == "FULL":
            fill(beside / "filler")
            return
        if name == "WAIT":
            while not (beside / "go_on").exists():
                time.sleep(0.1)
            return
        for pid in whom_to_hit(whom):
            os.kill(pid, getattr(signal, f"SIG{name}"))

    def passes(folder: Path | str) -> bool:
        """Whether it is the checkpoint of the point, still in `_saving/`."""
        path = Path(folder)
        return path.name == f"checkpoint-{step}" and path.parent.parent.name == stage

    def after(owner: object, attribute: str, is_here) -> None:
        inner = getattr(owner, attribute)

        @wraps(inner)
        def wrapped(*args, **kwargs):
            found = inner(*args, **kwargs)
            if is_here(*args, **kwargs):
                fire()
            return found

        setattr(owner, attribute, wrapped)

    if phase in ("begin", "end"):
        stages = run.ON_EVERY_RANK if stage in run.ON_EVERY_RANK else run.ON_RANK_0
        inner = stages[stage]

        def begun(*args):
            if phase == "begin":
                fire()
            found = inner(*args)
            if phase == "end":
                fire()
            return found

        stages[stage] = begun
    elif phase == "step":
        after(
            StepAgreement,
            "on_step_end",
            lambda self, args, state, *_, **__: (
                state.global_step == int(step) and Path(args.output_dir).name == stage
            ),
        )
    else:
        owner, attribute, is_here = {
            "weights": (Trainer, "save_model", lambda self, folder=None, *_, **__: passes(folder)),
            "optimizer": (
                Trainer,
                "_save_optimizer_and_scheduler",
                lambda self, folder: passes(folder),
            ),
            "sparsity": (sparse_trainer, "add_sparsity", lambda folder, *_: passes(folder)),
            "manifest": (checkpoint, "write_manifest", passes),
            "rename": (checkpoint, "_put_in_place", lambda folder, _: passes(folder)),
            "rotate": (
                checkpoint,
                "_rotate",
                lambda folder, number, _: (number, folder.name) == (int(step), stage),
            ),
        }[phase]
        after(owner, attribute, is_here)


def whom_to_hit(whom: str) -> list[int]:
    """Process ids, this one last."""
    launcher, me = os.getppid(), os.getpid()
    if whom.startswith("rank"):
        return [me]
    if whom == "launcher":
        return [launcher]
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return [*(int(pid) for pid in children if int(pid) != me), launcher, me]


def fill(path: Path) -> None:
    """Leaves no byte on a disk."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            with contextlib.suppress(OSError):
                while file.write(b"0" * size) == size:
                    pass


if __name__ == "__main__":
    sys.exit(main())
