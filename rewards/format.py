r"""Format: 1.0 where a completion matches a regular expression, 0.0 elsewhere.

The expression is searched anywhere in the completion, as `re.search` does; `\A` and `\Z` tie it to
the ends, `(?s)` lets `.` match line ends. Some expressions take time exponential in the length of a
completion that nearly matches, such as `(a+)+b`: the search has a limit, see `rewards.time_limit`.
"""

import re
from collections.abc import Callable

from rewards.correctness import completion_text, score_batch
from rewards.time_limit import TIME_LIMIT_SECONDS, TimeLimited

NO_PATTERN = (re.error, OverflowError, RecursionError)
"""What `re.compile` raises: `(`, `a{99999999999}`, ten thousand brackets."""


def matches(completion: str, pattern: str) -> float:
    """Search without a limit. An expression is compiled once, by `re`."""
    return float(re.search(pattern, completion) is not None)


class Format:
    """TRL reward function that compares completions with a regular expression."""

    __name__ = "format"

    def __init__(self, pattern: str, seconds: float = TIME_LIMIT_SECONDS):
        """Keep the expression.

        Args:
            pattern: In the syntax of `re`.
            seconds: Limit of one search, see `rewards.time_limit`.

        Raises:
            ValueError: `re` does not know it; the message starts with it.
        """
        try:
            re.compile(pattern)
        except NO_PATTERN as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        self.pattern = pattern
        self.search = TimeLimited("rewards.format:matches", seconds)

    def __call__(
        self,
        prompts: list[str] | list[list[dict]],
        completions: list[str] | list[list[dict]],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs,
    ) -> list[float]:
        """Search a batch.

        Args:
            prompts: B prompts; not read.
            completions: B texts, or B lists of messages, of which the last one counts.
            log_metric: TRL's, see `score_batch`.
            kwargs: The trainer's other columns; not read.

        Returns:
            B rewards.
        """
        calls = [(completion_text(completion), self.pattern) for completion in completions]
        return score_batch(self.__name__, self.search, calls, log_metric)
