"""Every kind of fault in turn: the run is started again and has to end as an undisturbed one.

    python -m tests.soak.faults [--go_on] [--only WORD]

writes `results/faults.json` after each fault, whose name replays it (`faulty_train.py`). Kills are
drawn from (stage, step, how far a save has come) with a fixed seed. Status 1: a fault lost a run or
changed a bit of what it ended with.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.artifacts import git_commit, installed_versions, write_json
from tests.soak.runs import ROOT, differences, fork, launch, result

RESULTS = ROOT / "results" / "faults.json"
SEED = 6
NUM_KILLS = 16
"""On one rank; four more on two."""
STEPS = {"distill": 6, "grpo": 4}
SAVES = {"distill": (2, 4, 6), "grpo": (2, 4)}
PHASES = ("weights", "optimizer", "sparsity", "manifest", "rename", "rotate")
ON_EVERY_RANK = ("step", "optimizer", "sparsity", "manifest")
TARGETS = {
    "launcher": "SIGKILL to the launcher alone",
    "rank0": "SIGKILL to one rank",
    "rank1": "SIGKILL to one rank",
    "group": "SIGKILL to launcher and ranks",
}
DAMAGED = "grpo:3:step:rank0:KILL"
"""Leaves checkpoint-2 of grpo as the newest."""


def points() -> Iterator[str]:
    """Every STAGE:STEP:PHASE there is."""
    for stage in ("prune", "distill", "grpo", "evaluate"):
        yield from (f"{stage}:0:{phase}" for phase in ("begin", "end"))
    for stage, steps in STEPS.items():
        yield from (f"{stage}:{step}:step" for step in range(1, steps))
        yield from (f"{stage}:{step}:{phase}" for step in SAVES[stage] for phase in PHASES)


def kills() -> Iterator[tuple[str, int]]:
    """Twenty faults, each with the ranks of its run; the targets take turns."""
    draw = random.Random(SEED)
    for number, point in enumerate(draw.sample(list(points()), NUM_KILLS)):
        yield f"{point}:{('launcher', 'group', 'rank0')[number % 3]}:KILL", 1
    shared = [point for point in points() if point.split(":")[2] in ON_EVERY_RANK]
    targets = ("launcher", "rank0", "rank1", "group")
    for point, target in zip(draw.sample(shared, len(targets)), targets, strict=True):
        yield f"{point}:{target}:KILL", 2


def signals() -> Iterator[tuple[str, int]]:
    """One of each, and one to the second of two ranks."""
    yield "distill:3:step:rank0:TERM", 1
    yield "grpo:2:optimizer:rank0:USR1", 1
    yield "grpo:1:step:rank0:INT", 1
    yield "distill:3:step:rank1:TERM", 2


def try_fault(folder: Path, fault: str, ranks: int) -> dict:
    """Runs into a fault, then to the end. Returns what came of it.

    The undisturbed run comes first: it compiles DeepSpeed's operators, and a process killed while
    it compiles leaves a lock for which later ones wait forever.
    """
    undisturbed(folder, ranks)
    target, name = fault.split(":")[3:]
    out = folder / f"{fault.replace(':', '-')}-{ranks}"
    shutil.rmtree(out, ignore_errors=True)
    start = fork if ranks == 1 and target.startswith("rank") else launch
    first = start(out, fault, ranks)
    said = f"fault: {fault}" in out.with_name(f"{out.name}.log").read_text(errors="replace")
    assert said, f"{fault} was never reached; see {out}.log"
    status = (out / "exit_status").read_text().strip() if (out / "exit_status").exists() else None
    assert name == "KILL" or status == "75", f"{fault} left status {status}; see {out}.log"
    kind = TARGETS[target] if name == "KILL" else f"SIG{name}"
    if ranks > 1 and name != "KILL":
        kind += " to one of two ranks"
    return {"kind": kind, "ranks": ranks, "first": first, "left_status": status} | go_on(
        folder, out, ranks
    )


def go_on(folder: Path, out: Path, ranks: int) -> dict:
    """Starts a run again and compares what it ends with."""
    started = time.monotonic()
    status = (fork if ranks == 1 else launch)(out, None, ranks)
    found = {"again": status, "again_seconds": round(time.monotonic() - started, 1)}
    if status == 0:
        found["differing"] = differences(result(out), undisturbed(folder, ranks))
        if not found["differing"]:
            shutil.rmtree(out)
    return found | {"lost": status != 0, "identical": found.get("differing") == []}


def undisturbed(folder: Path, ranks: int) -> dict[str, str]:
    """What the run nothing happens to ends with; made once."""
    path = folder / f"undisturbed-{ranks}.json"
    if not path.exists():
        out = folder / f"undisturbed-{ranks}"
        shutil.rmtree(out, ignore_errors=True)
        status = (fork if ranks == 1 else launch)(out, None, ranks)
        assert status == 0, f"the undisturbed run ended with {status}; see {out}.log"
        write_json(path, result(out))
    return json.loads(path.read_text())


def flip_a_bit(path: Path) -> None:
    """In the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "truncated": ("optimizer.pt", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "missing": ("trainer_state.json", Path.unlink),
    "bit-flipped": ("model.safetensors", flip_a_bit),
    "zero-length": ("scheduler.pt", lambda path: path.write_bytes(b"")),
}


def try_damage(folder: Path, kind: str) -> dict:
    """Harms a file of the newest checkpoint of a run that was killed."""
    name, damage = DAMAGE[kind]
    killed, out = folder / "killed", folder / kind
    if not killed.exists():
        fork(killed, DAMAGED)
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(killed, out)
    damage(out / "grpo" / "checkpoint-2" / name)
    return {"kind": f"a {kind} file in the newest checkpoint", "ranks": 1} | go_on(folder, out, 1)


def try_full_disk(folder: Path, fault: str) -> dict:
    """On a small file system of its own, in a namespace that this program is started in again."""
    disk = folder / "disk"
    disk.mkdir(exist_ok=True)
    undisturbed(folder, 1)
    inside = f"{sys.executable} -m tests.soak.faults --inside {fault} {folder}"
    script = f"mount -t tmpfs -o size=256m none {disk} && exec {inside}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def inside_full_disk(fault: str, folder: Path) -> dict:
    """Fills the disk at the fault, makes room, and goes on."""
    out = folder / "disk" / "run"
    first = fork(out, fault)
    (folder / "disk" / "filler").unlink()
    log = out.with_name(f"{out.name}.log").read_text(errors="replace")
    assert first == 2, f"ended with {first}:\n{log[-3000:]}"
    return {"kind": "a full disk", "ranks": 1, "first": first} | go_on(folder, out, 1)


def scenarios(folder: Path) -> Iterator[tuple[str, object]]:
    """Name to what tries it."""
    for fault, ranks in [*kills(), *signals()]:
        yield f"{fault} x{ranks}", lambda f=fault, r=ranks: try_fault(folder, f, r)
    for kind in DAMAGE:
        yield kind, lambda k=kind: try_damage(folder, k)
    for fault in ("grpo:2:weights", "distill:4:weights", "prune:0:begin"):
        fault += ":rank0:FULL"
        yield fault, lambda f=fault: try_full_disk(folder, f)


def main(argv: list[str] | None = None) -> int:
    """Returns 0 where every run ended as the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--go_on", action="store_true", help="leave out what the file has already")
    parser.add_argument("--only", default="", help="faults whose name holds this; others stay")
    parser.add_argument("--folder", type=Path, help="of the runs (default a temporary one)")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        print(json.dumps(inside_full_disk(options.inside[0], Path(options.inside[1]))))
        return 0
    folder = options.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    keeps = RESULTS.exists() and (options.go_on or options.only)
    found = json.loads(RESULTS.read_text())["faults"] if keeps else {}
    commit = git_commit()
    for name, try_it in scenarios(folder):
        if options.only not in name or (options.go_on and name in found):
            continue
        found[name] = try_it() | {"git_commit": commit}
        print(name, json.dumps(found[name]), flush=True)
        record = {"command": "make soak", "seed": SEED, "date": time.strftime("%Y-%m-%d")}
        write_json(RESULTS, record | {"versions": installed_versions(), "faults": found})
    bad = [name for name, entry in found.items() if not entry["identical"]]
    print(f"{len(found)} faults, {len(bad)} not as the undisturbed run {' '.join(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
