"""Tasks: rows of a prompt and an answer that can be verified, in four splits that share no prompt.

train        the prompts that distillation and GRPO see
calibration  inputs of one-shot pruning
probe        prompts on which masks and students are judged during training
test         held out: nothing but evaluation reads them

A row's split is a function of its prompt alone: b = sha256(prompt) mod 100, and the ranges of b in
`SPLIT_STARTS` are the splits. No seed and no order of the file enters, so a prompt never moves from
one split into another, and a prompt that occurs twice cannot be on both sides. Where the source
names a test split of its own, that one is the test split, its prompts are taken out of the others,
and what the hash would have held out is trained on.

Left out: streaming. All rows are in memory.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pipeline.data.sources import read_json_lines, read_with_datasets
from pipeline.errors import UserError

SPLIT_STARTS = {"train": 0, "calibration": 80, "probe": 85, "test": 90}
"""First of the 100 hash values of each split: 80 % train, 5 % calibration, 5 % probe, 10 % test."""

BUNDLED_TEST_SEED = 0
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(?<!\.json)(?<!\.jsonl)")


@dataclass(frozen=True)
class Row:
    """One prompt and the answer that a verifier compares a completion with."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """Rows of one task. No prompt occurs twice, within a split or in two of them."""

    name: str
    train: list[Row]
    calibration: list[Row]
    probe: list[Row]
    test: list[Row]


def split_of(prompt: str) -> str:
    """Name the split a prompt belongs to: train, calibration, probe or test.

    Args:
        prompt: The text as it stands in the row, before any chat template.

    Returns:
        The split, the same on every machine and in every run.
    """
    bucket = _hash(prompt) % 100
    return next(split for split, start in reversed(SPLIT_STARTS.items()) if bucket >= start)


def check_source(path: str) -> None:
    """Looks whether `task.path` is something that can be read, without reading it.

    Raises:
        UserError: It is neither on disk nor a Hub id.
    """
    if path == "bundled" or Path(path).expanduser().exists() or HUB_ID.fullmatch(path):
        return
    raise UserError(
        f"task.path={path!r}: there is no such file or folder, and it is not a Hub id. Set it "
        "to a file with one JSON object per line, to a Hub id such as openai/gsm8k, or to "
        "bundled."
    )


def load_task(
    path: str,
    *,
    subset: str | None = None,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
    num_train: int,
    num_calibration: int,
    num_probe: int,
    num_test: int,
    seed: int,
) -> Task:
    """Load a task by name, from a local file or folder, or from the Hub.

    Args:
        path: `bundled` (the arithmetic task of `pipeline.data.arithmetic`); a file with one JSON
            object per line; a folder that `datasets` can load; or a Hub id. What exists on disk
            wins over the Hub.
        subset: Configuration of a Hub dataset, such as `main`. Nothing else has one.
        prompt_column: Column of the prompts. `bundled` has no columns.
        answer_column: Column of the answers: text or a number. `bundled` has no columns.
        num_train: Training rows to generate. Of a file, a folder or a Hub dataset all are used.
        num_calibration: Calibration rows at most.
        num_probe: Probe rows at most.
        num_test: Test rows at most. Fewer are returned where fewer exist.
        seed: Of the bundled train, calibration and probe rows, and of which calibration rows are
            taken of those that were read. Test rows are the same for every seed, so that two runs
            answer the same held-out prompts.

    Returns:
        The four splits. Rows that were read stand in file order in train, in the order of a hash
        elsewhere.

    Raises:
        UserError: The source is missing, unreadable or gated, a line or a column is wrong, or a
            split would be empty.
    """
    counts = {"calibration": num_calibration, "probe": num_probe, "test": num_test}
    if path == "bundled":
        return _bundled_task({"train": num_train, **counts}, seed)
    columns = (prompt_column, answer_column)
    local = Path(path).expanduser()
    if local.is_file():
        pool, held_out = read_json_lines(path, local, *columns), []
    elif local.is_dir():
        pool, held_out = read_with_datasets(path, str(local), None, *columns)
    else:
        check_source(path)
        pool, held_out = read_with_datasets(path, path, subset, *columns)
    return _split(path, pool, held_out, counts, seed)


def _hash(prompt: str) -> int:
    return int.from_bytes(sha256(prompt.encode()).digest(), "big")


def _bundled_task(counts: dict[str, int], seed: int) -> Task:
    from pipeline.data.arithmetic import generate_rows  # imports `split_of` from here

    seeds = dict.fromkeys(counts, seed) | {"test": BUNDLED_TEST_SEED}
    splits = {
        split: [Row(*pair) for pair in generate_rows(count, seeds[split], split)]
        for split, count in counts.items()
    }
    return Task(name="bundled", **splits)


def _split(
    path: str,
    pool: Iterable[tuple[str, str]],
    held_out: Iterable[tuple[str, str]],
    counts: dict[str, int],
    seed: int,
) -> Task:
    """Put every distinct prompt into one split and keep the first `counts` of each."""
    pooled, test = _by_prompt(pool), _by_prompt(held_out)
    splits: dict[str, list[Row]] = {split: [] for split in SPLIT_STARTS}
    splits["test"].extend(test.values())
    for prompt, row in pooled.items():
        if prompt not in test:
            split = split_of(prompt)
            splits["train" if test and split == "test" else split].append(row)
    empty = [split for split, rows in splits.items() if not rows]
    if empty:
        raise UserError(
            f"task.path={path!r}: its {len(pooled)} distinct prompts leave no row for "
            f"{' and '.join(empty)}, because a hash of the prompt gives 5 % of them to calibration "
            "and 5 % to probe. Give it more rows: with 200 a split hardly ever stays empty."
        )
    for split, count in counts.items():
        salt = f"{seed} " if split == "calibration" else ""
        splits[split] = sorted(splits[split], key=lambda row: _hash(salt + row.prompt))[:count]
    return Task(name=path, **splits)


def _by_prompt(pairs: Iterable[tuple[str, str]]) -> dict[str, Row]:
    """Keep the first row of every prompt."""
    rows: dict[str, Row] = {}
    for prompt, answer in pairs:
        rows.setdefault(prompt, Row(prompt, answer))
    return rows
