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

A completion is hostile text: it is searched in linear time and never executed; `math` reads only
its end and works under a time limit.

Left out: a time limit outside the main thread of a process, where Python delivers no signals.
"""

import re
import threading
from collections.abc import Callable
from decimal import Decimal

from rewards.dotted import load_function

Verifier = Callable[[str, str], float]

MAX_DIGITS = 100
"""A number with more digits than this is no answer."""

MAX_MATH_CHARACTERS = 4000
"""`math` reads this many characters at the end of a completion, where the answer is."""

MATH_TIMEOUT_SECONDS = 2
"""Time limit of `math` for each parsing and each comparison; 0.0 when it is reached."""

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
    """Compare symbolically with math-verify.

    Args:
        completion: Only its last `MAX_MATH_CHARACTERS` characters are read.
        answer: LaTeX (with or without `$`) or a plain expression.

    Returns:
        1.0 if math-verify finds them equal; 0.0 if not, on any failure, and past the time limit.

    Raises:
        RuntimeError: Called outside the main thread, where the time limit would not hold.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("The verifier math needs the main thread for its time limit.")
    from math_verify import parse, verify

    try:
        expected = _parsed_answer(parse, answer)
        given = parse(completion[-MAX_MATH_CHARACTERS:], parsing_timeout=MATH_TIMEOUT_SECONDS)
        return float(verify(expected, given, timeout_seconds=MATH_TIMEOUT_SECONDS))
    except Exception:
        return 0.0


VERIFIERS: dict[str, Verifier] = {"exact": exact, "numeric": numeric, "gsm8k": gsm8k, "math": math}


def find_verifier(name: str) -> Verifier:
    """Look up a built-in verifier, or import one by dotted path.

    Args:
        name: A key of `VERIFIERS` or `my.module:fn`, a function (completion, answer) -> float.

    Returns:
        The verifier.

    Raises:
        ValueError: It is neither; the message starts with the name.
    """
    return VERIFIERS[name] if name in VERIFIERS else load_function(name)


class Correctness:
    """TRL reward function that verifies completions against the `answer` column.

    A class and not a closure, so that it can be pickled to another process.
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
        **kwargs,
    ) -> list[float]:
        """Verify a batch.

        Args:
            prompts: B prompts; not read.
            completions: B texts, or B lists of messages, of which the last one counts.
            answer: B answers, the dataset's column of that name.
            kwargs: The trainer's other columns; not read.

        Returns:
            B rewards.
        """
        return [
            float(self.verifier(_completion_text(completion), expected))
            for completion, expected in zip(completions, answer, strict=True)
        ]


def _completion_text(completion: str | list[dict]) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def _number(match: re.Match | None) -> Decimal | None:
    if match is None or len(match["digits"]) > MAX_DIGITS:
        return None
    value = Decimal(match["digits"].replace(",", ""))
    return -value if match["minus"] else value


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


def _parsed_answer(parse: Callable, answer: str) -> list:
    """Parse the dataset's answer; math-verify finds bare LaTeX only between dollar signs."""
    marked = answer if "$" in answer or "\\boxed" in answer else f"${answer}$"
    return parse(marked, parsing_timeout=MATH_TIMEOUT_SECONDS)
