"""Plain text: a file or a dataset as one string, and pieces of its tokens to calibrate on.

A `.jsonl` file holds one document per line in its column `text`, a dataset (a folder or on the Hub)
one per row; a blank line joins them. Any other file is taken as it stands. Left out: an end token
between documents.
"""

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from pipeline.data.sources import read_text_column
from pipeline.errors import UserError

COLUMN = "text"
SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a pair, which JSON may hold and UTF-8 cannot."""

DEFAULT_SPLIT = "test"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.txt)(?<!\.json)(?<!\.jsonl)(?<!\.md)")


def check_text_source(path: str, key: str) -> None:
    """Looks whether there is text to read, without reading it.

    Raises:
        UserError: It is neither on disk nor a Hub id with its owner.
    """
    if not Path(path).expanduser().exists() and not HUB_ID.fullmatch(path):
        raise UserError(
            f"{key}: {path!r} is no file or folder, and no Hub id; set a text file, JSON lines "
            f"with a column {COLUMN}, a dataset folder, or a Hub id such as Salesforce/wikitext"
        )


def load_text(path: str, keys: str, *, subset: str | None = None, split: str | None = None) -> str:
    """Load text from a file, a folder that `datasets` can load, or the Hub.

    Args:
        path: What exists on disk wins over the Hub.
        keys: What the config keys begin with (`evaluate.text_`): `path`, `subset` and `split`
            follow.
        subset: Configuration of a Hub dataset.
        split: Of a folder or a Hub dataset; None is `DEFAULT_SPLIT`.

    Raises:
        UserError: It cannot be loaded, or holds no text.
    """
    key, local = f"{keys}path", Path(path).expanduser()
    if local.is_file():
        return read_text(path, key)
    check_text_source(path, key)
    source = str(local) if local.is_dir() else path
    documents = read_text_column(path, source, subset, split or DEFAULT_SPLIT, COLUMN, keys)
    text = "\n\n".join(documents)
    if not text.strip():
        raise UserError(f"{key}={path!r}: it holds no text. Set another dataset.")
    return text


def read_text(path: str, key: str) -> str:
    """Read a text file in UTF-8.

    Args:
        path: The value of the config key.
        key: The config key, for messages (`evaluate.text_path`).

    Returns:
        The text, with its line ends as they are.

    Raises:
        UserError: There is no such file, it is not UTF-8 or holds no text, or a line is broken or
            lacks the column.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{key}={path!r}: it cannot be read ({error.strerror}). Set a text file, or JSON lines "
            f"with a column {COLUMN}."
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}={path!r}: it is not UTF-8 (byte {error.start}). Save it as UTF-8, or set "
            "another file."
        ) from error
    if file.suffix == ".jsonl":
        text = "\n\n".join(_documents(path, key, text))
    if not text.strip():
        raise UserError(f"{key}={path!r}: it holds no text. Set another file.")
    return text


def _documents(path: str, key: str, text: str) -> list[str]:
    """The column of every line that is not blank."""
    documents = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{key}={path!r}: line {number} is not JSON ({error}). Mend or delete it, or give "
                "the file another ending if it is plain text."
            ) from error
        document = record.get(COLUMN) if isinstance(record, dict) else None
        if not isinstance(document, str) or SURROGATE.search(document):
            raise UserError(
                f"{key}={path!r}: line {number} has no column {COLUMN} that holds text. Write one "
                f'object such as {{"{COLUMN}": "..."}} per line.'
            )
        documents.append(document)
    return documents


def text_chunks(
    token_ids: Sequence[int],
    *,
    seq_len: int,
    num_chunks: int,
    seed: int,
    key: str = "calibration.text_path",
) -> list[list[int]]:
    """Draw pieces of a text at random that do not overlap.

    The tokens that no piece takes are dealt out as gaps: sorted random offsets s_1 <= ... <= s_n
    into what is left over, and piece i starts at s_i + (i - 1) seq_len.

    Args:
        token_ids: The whole text.
        seq_len: Tokens in a piece.
        num_chunks: How many pieces.
        seed: Of the places.
        key: The config key the text came from, for messages.

    Returns:
        `num_chunks` lists of `seq_len` token ids, in the order of the text.

    Raises:
        UserError: The text is too short for so many pieces.
    """
    left_over = len(token_ids) - num_chunks * seq_len
    if left_over < 0:
        raise UserError(
            f"{key}: its text has {len(token_ids)} tokens, fewer than {num_chunks} pieces of "
            f"{seq_len}. Set a longer text, fewer pieces or shorter ones."
        )
    chance = random.Random(seed)
    offsets = sorted(chance.randint(0, left_over) for _ in range(num_chunks))
    starts = (offset + index * seq_len for index, offset in enumerate(offsets))
    return [list(token_ids[start : start + seq_len]) for start in starts]
