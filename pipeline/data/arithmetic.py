"""The bundled task: sums and differences of two three-digit numbers, answered at once.

A prompt such as `472-685=` asks for `-213`, most significant digit first and without steps in
between, so the first token needs the sign and every carry or borrow. There are 1.62 million
prompts; those of the splits are disjoint.
"""

import random

from pipeline.data.tasks import split_of

SIGNS = "+-"


def solve(prompt: str) -> str:
    """The answer to a prompt."""
    first, sign, second = int(prompt[:3]), prompt[3], int(prompt[4:7])
    return str(first + second if sign == "+" else first - second)


def generate_rows(num_rows: int, seed: int, split: str) -> list[tuple[str, str]]:
    """Draws distinct prompts of one split.

    Args:
        num_rows: How many.
        seed: Of the draw; which split a prompt belongs to does not depend on it.
        split: `train`, `calibration`, `probe` or `test`.

    Returns:
        (prompt, answer) pairs.
    """
    generator = random.Random(f"{seed}/{split}")
    rows: dict[str, str] = {}
    while len(rows) < num_rows:
        first, second = generator.randint(100, 999), generator.randint(100, 999)
        prompt = f"{first}{generator.choice(SIGNS)}{second}="
        if split_of(prompt) == split:
            rows[prompt] = solve(prompt)
    return list(rows.items())
