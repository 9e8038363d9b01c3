r"""Correctness: 1.0 where a completion gives the right answer, 0.0 elsewhere.

A verifier is a function (completion, answer) -> 0.0 or 1.0. Four are built in:

exact    completion and answer are the same text, outer white space aside
numeric  the last number in the completion equals the last number in the answer
gsm8k    the same, where the number behind the last `####` comes first (Cobbe et al. 2021,
         arXiv 2110.14168: the answers of GSM8K end in `#### 42`)
math     math-verify (https://github.com/huggingface/Math-Verify) parses both, LaTeX too, and
         compares them symbolically

Numbers are compared as decimals, without rounding: `1,234.50`, `$1234.5` and `1234.5` are equal. A
fraction or `1e5` is read as two numbers; `math` knows what they mean.

A completion is hostile text and never executed. `exact`, `numeric` and `gsm8k` search it in linear
time. `math` reads only its end, and answers, like a verifier of the user's own, from a process with
limits on time and memory (`rewards.time_limit`). math-verify has sympy build plain arithmetic with
Python's `eval`; only digits, white space, dots, brackets and operators get there, never a name.
"""

import logging
import re
from collections.abc import Callable, Sequence
from decimal import Decimal

from rewards.dotted import load_function
from rewards.time_limit import TIME_LIMIT_SECONDS, TimeLimited

Verifier = Callable[[str, str], float]

MAX_DIGITS = 100
"""A number with more digits than this is no answer."""

MAX_MATH_CHARACTERS = 4000
"""`math` reads this many characters at the end of a completion, where the answer is."""

NUMBER = re.compile(
    r"(?P<minus>(?<![0-9A-Za-z.)])[-\u2212])?\$?"
    r"(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


def exact(completion: str, answer: str) -> float:
    """Compare as text, without outer white space."""
    return float(completion.strip() == answer.strip())


def numeric(completion: str, answer: str) -> float:
    """Compare the last number of the completion with the last number of the answer."""
    return _equal(_last_number(completion), _last_number(answer))


def gsm8k(completion: str, answer: str) -> float:
    """Compare the numbers behind the last `####`; where a text has no `####`, its last number."""
    return _equal(_gsm8k_number(completion), _gsm8k_number(answer))


def math(completion: str, answer: str) -> float:
    """Compare symbolically with math-verify. It has no limit by itself: see `find_verifier`.

    Args:
        completion: Only its last `MAX_MATH_CHARACTERS` characters are read.
        answer: LaTeX (with or without `$`) or a plain expression.

    Returns:
        1.0 if math-verify finds them equal; 0.0 if not, and on any failure.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limit is off
    marked = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    try:
        expected = parse(marked, parsing_timeout=None)
        given = parse(completion[-MAX_MATH_CHARACTERS:], parsing_timeout=None)
        return float(verify(expected, given, timeout_seconds=None))
    except Exception:
        return 0.0


VERIFIERS: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "gsm8k": gsm8k, "math": math}


def find_verifier(name: str, seconds: float = TIME_LIMIT_SECONDS) -> Verifier:
    """Look up a built-in verifier, or import one by dotted path.

    Args:
        name: A key of `VERIFIERS` or `my.module:fn`, a function (completion, answer) -> float.
        seconds: Limit of `math` and of functions by dotted path, see `rewards.time_limit`.

    Returns:
        The verifier. The other three answer in this process.

    Raises:
        ValueError: It is neither; the message starts with the name.
    """
    if name == "math":
        return TimeLimited("rewards.correctness:math", seconds, warm_up=("1", "1"))
    if name in VERIFIERS:
        return VERIFIERS[name]
    load_function(name)
    return TimeLimited(name, seconds)


class Correctness:
    """TRL reward function that verifies completions against the `answer` column.

    A class and not a closure, so that it can be pickled to another process.

    Attributes:
        verifier: A `TimeLimited` one counts in `timeouts` and `failures` since it was made.
    """

    __name__ = "correctness"

    def __init__(self, verifier: Verifier):
        """Keep the verifier (completion, answer) -> float."""
        self.verifier = verifier

    def __call__(
        self,
        prompts: list[str] | list[list[dict]],
        completions: list[str] | list[list[dict]],
        answer: list[str],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float]:
        """Verify a batch.

        Args:
            prompts: B prompts; not read.
            completions: B texts, or B lists of messages, of which the last one counts.
            answer: B answers, the dataset's column of that name.
            log_metric: TRL's, see `score_batch`.
            kwargs: The trainer's other columns; not read.

        Returns:
            B rewards.
        """
        texts = map(completion_text, completions)
        calls = list(zip(texts, answer, strict=True))
        return score_batch(self.__name__, self.verifier, calls, log_metric)


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion, or of its last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def score_batch(
    name: str,
    function: Callable[..., float],
    calls: Sequence[tuple[str, ...]],
    log_metric: Callable[[str, float], None] | None,
) -> list[float]:
    """Call a function for each completion of a batch and report how many had no answer.

    Args:
        name: The reward's. The metrics are `rewards/<name>/timed_out` and `rewards/<name>/failed`,
            fractions of the batch in [0, 1].
        function: Its counters are reported if it is a `TimeLimited`.
        calls: B times the function's arguments, B >= 1.
        log_metric: TRL's, which averages over batches and ranks; None reports nothing.

    Returns:
        B values.
    """
    if not isinstance(function, TimeLimited) or log_metric is None:
        return [float(function(*arguments)) for arguments in calls]
    timeouts, failures = function.timeouts, function.failures
    values = [function(*arguments) for arguments in calls]
    log_metric(f"rewards/{name}/timed_out", (function.timeouts - timeouts) / len(calls))
    log_metric(f"rewards/{name}/failed", (function.failures - failures) / len(calls))
    return values


def _number(match: re.Match | None) -> Decimal | None:
    if match is None or len(match["digits"]) > MAX_DIGITS:
        return None
    value = Decimal(match["digits"].replace(",", ""))
    return value.copy_negate() if match["minus"] else value  # `-value` rounds to 28 digits


def _last_number(text: str) -> Decimal | None:
    last = None
    for match in NUMBER.finditer(text):
        last = match
    return _number(last)


def _gsm8k_number(text: str) -> Decimal | None:
    _, mark, behind = text.rpartition("####")
    return _number(NUMBER.search(behind)) if mark else _last_number(text)


def _equal(given: Decimal | None, expected: Decimal | None) -> float:
    return float(given is not None and given == expected)
