"""Reading tasks, pairs of prompt and answer, from a file, a folder or the Hub, and columns of text.

A file holds one JSON object per line; a folder or a Hub dataset goes through the `datasets`
library. Every fault is one message with the config's key, the place in the data and the remedy.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

TEST_SPLIT_NAMES = ("test", "validation")
TASK_REMEDY = (
    "Set a file with one JSON object per line, or a folder or Hub id with train and test splits."
)
TEXT_REMEDY = "Set a text file, JSON lines, or a folder or Hub id, with a column text of texts."

Pairs = list[tuple[str, str]]


def read_json_lines(path: str, file: Path, prompt_column: str, answer_column: str) -> Pairs:
    """Read a file with one JSON object per line; blank lines are skipped.

    Args:
        path: The user's own `task.path`, for messages.
        file: Where it is.
        prompt_column: Column of the prompts.
        answer_column: Column of the answers: text or a number.

    Returns:
        (prompt, answer) in file order, at least one.

    Raises:
        UserError: The file cannot be read or is empty, or a line is broken or lacks a column.
    """
    return _pairs(path, _parse_lines(path, file), prompt_column, answer_column)


def read_with_datasets(
    path: str, source: str, subset: str | None, prompt_column: str, answer_column: str
) -> tuple[Pairs, Pairs]:
    """Read a folder or a Hub dataset with the `datasets` library.

    Args:
        path: The user's own `task.path`, for messages.
        source: What `datasets.load_dataset` shall load.
        subset: Configuration of a Hub dataset.
        prompt_column: Column of the prompts.
        answer_column: Column of the answers: text or a number.

    Returns:
        Pairs of the `train` split (else of the first one), and pairs of a test split: `test`, else
        `validation`, else none.

    Raises:
        UserError: It cannot be loaded, is empty, or a row lacks a column.
    """
    splits = _load_dataset(path, source, subset, "task.", TASK_REMEDY)

    def read(split: str) -> Pairs:
        records = ((f"row {i} of split {split}", record) for i, record in enumerate(splits[split]))
        return _pairs(path, records, prompt_column, answer_column)

    pool = "train" if "train" in splits else next(iter(splits))
    test = next((name for name in TEST_SPLIT_NAMES if name in splits and name != pool), None)
    return read(pool), read(test) if test else []


def read_text_column(
    path: str, source: str, subset: str | None, split: str, column: str, keys: str
) -> list[str]:
    """Read a column of text of a folder or a Hub dataset with the `datasets` library.

    Args:
        path: The user's own value of the config key, for messages.
        source: What `datasets.load_dataset` shall load.
        subset: Configuration of a Hub dataset.
        split: Name of the split.
        column: Name of the column.
        keys: What the config keys begin with (`evaluate.text_`): `path`, `subset` and `split`
            follow.

    Returns:
        The column in the order of the rows.

    Raises:
        UserError: It cannot be loaded, or lacks the split or the column.
    """
    splits = _load_dataset(path, source, subset, keys, TEXT_REMEDY)
    if split not in splits:
        raise UserError(
            f"{keys}split={split!r}: {path} has no such split. Set {' or '.join(splits)}."
        )
    documents = splits[split]
    if column not in documents.column_names:
        raise UserError(
            f"{keys}path={path!r}: split {split} has no column {column} (it has "
            f"{', '.join(documents.column_names)}). {TEXT_REMEDY}"
        )
    texts = documents[column][:]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(
            f"{keys}path={path!r}: column {column} of split {split} holds more than text. "
            f"{TEXT_REMEDY}"
        )
    return texts


def _load_dataset(path: str, source: str, subset: str | None, keys: str, remedy: str) -> Any:
    """All splits of a dataset, by name."""
    import datasets

    try:
        return datasets.load_dataset(source, subset)
    except Exception as error:
        raise UserError(_loading_error(path, subset, error, keys, remedy)) from error


def _parse_lines(path: str, file: Path) -> Iterator[tuple[str, object]]:
    """Yield (where it stands, parsed value) for every line that is not blank."""
    try:
        lines = file.read_bytes().splitlines()
    except OSError as error:
        raise UserError(
            f"task.path={path!r}: it cannot be read ({error.strerror}). Make it readable or set "
            "another file."
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if text.strip():
                yield f"line {number}", json.loads(text)
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}"
                if isinstance(error, json.JSONDecodeError)
                else str(error)
            )
            raise UserError(
                f"task.path={path!r}: line {number} is not JSON ({reason}). A task file holds one "
                'JSON object per line, such as {"prompt": "1+1=", "answer": "2"}; mend or delete '
                f"line {number}."
            ) from error


def _loading_error(path: str, subset: str | None, error: Exception, keys: str, remedy: str) -> str:
    """Say in one line why `datasets` could not load `path`, and what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ValueError) and "config" in text.lower():
        return (
            f"{keys}subset={subset!r}: {path} needs the name of one of its configurations. {text} "
            f"Set {keys}subset to one of them."
        )
    if isinstance(error, ConnectionError):
        why = "HF_HUB_OFFLINE is set" if "Offline" in text else "the Hub cannot be reached"
        return (
            f"{keys}path={path!r}: no such file or folder, {why}, and the dataset is not in the "
            "local cache. Download it once with a network (the same command; HF_HOME says where "
            "it is kept), or set a local file."
        )
    if "gated" in text or "doesn't exist on the Hub" in text:
        return (
            f"{keys}path={path!r}: no such file or folder, and {text} Check the spelling; for a "
            "gated or private dataset accept its terms on its page and set HF_TOKEN; or set a "
            "local file."
        )
    cause = " ".join(str(error.__cause__ or "").split())
    return (
        f"{keys}path={path!r}: it cannot be loaded: {text}{f' ({cause})' if cause else ''} {remedy}"
    )


def _pairs(
    path: str, records: Iterable[tuple[str, object]], prompt_column: str, answer_column: str
) -> Pairs:
    """Check every record and keep its prompt and its answer."""
    pairs = [
        (
            _column(path, where, record, "prompt_column", prompt_column),
            _column(path, where, record, "answer_column", answer_column),
        )
        for where, record in records
    ]
    if not pairs:
        raise UserError(
            f"task.path={path!r}: it has no rows. A task file holds one JSON object per line."
        )
    return pairs


def _column(path: str, where: str, record: object, key: str, column: str) -> str:
    """Read one column of one record as text."""
    if not isinstance(record, dict):
        raise UserError(
            f"task.path={path!r}: {where} is a {type(record).__name__}, not an object with a "
            "prompt and an answer. Write one JSON object per line."
        )
    if column not in record:
        raise UserError(
            f"task.{key}={column!r}: {where} of {path} has no such column (it has "
            f"{', '.join(record) or 'none'}). Set task.{key} to one of these, or mend {where}."
        )
    value = record[column]
    if key == "answer_column" and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str) or not value.strip() or not _is_unicode(value):
        wanted = "text" if key == "prompt_column" else "text or a number"
        raise UserError(
            f"task.{key}={column!r}: {where} of {path} holds {str(value)[:40]!a}, and it must be "
            f"{wanted} that is not empty. Mend or delete {where}."
        )
    return value


def _is_unicode(text: str) -> bool:
    """Tell whether `text` can be encoded: JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
