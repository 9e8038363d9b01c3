"""The bundled task: sums and differences of four two-digit numbers, answered at once.

A prompt such as `47+85-29+63=` asks for `166`, most significant digit first and without steps in
between, so the first digit needs every carry and borrow of the chain, and the sign. The prompts of
the splits are disjoint.
"""

import random

from pipeline.data.tasks import split_of

NUM_OPERANDS = 4
SIGNS = "+-"


def solve(prompt: str) -> str:
    """The answer to a prompt, from left to right."""
    total, sign, operand = 0, "+", ""
    for character in prompt:
        if character.isdigit():
            operand += character
        else:
            total += int(sign + operand)
            sign, operand = character, ""
    return str(total)


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
        prompt = str(generator.randint(10, 99))
        for _ in range(NUM_OPERANDS - 1):
            prompt += generator.choice(SIGNS) + str(generator.randint(10, 99))
        prompt += "="
        if split_of(prompt) == split:
            rows[prompt] = solve(prompt)
    return list(rows.items())
