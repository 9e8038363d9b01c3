"""The bundled task: chains of two invented operations on the residues modulo the prime 61.

    a @ b = (a^3 + a b^2 + b) mod 61
    a # b = (b^3 + a^2 b + a) mod 61       evaluated from the left

A prompt such as `12@35#07@44=` asks for the three results on the way, two digits each. Small
transformers find no short cut to such polynomials (Power et al. 2022, arXiv 2201.02177, appendix
A.1.1), so both tables, 2 x 61^2 entries of log2(61) bits, have to be stored in the weights: the
task needs its model. Every entry occurs in training; the chains of the splits, 111 million in all,
are disjoint.
"""

import random
from collections.abc import Callable

from pipeline.data.tasks import split_of

MODULUS = 61
NUM_OPERATIONS = 3
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "@": lambda a, b: (a**3 + a * b**2 + b) % MODULUS,
    "#": lambda a, b: (b**3 + a**2 * b + a) % MODULUS,
}


def solve(prompt: str) -> str:
    """The answer to a prompt: every result on the way, two digits each."""
    result, answer = int(prompt[:2]), ""
    for start in range(2, len(prompt) - 1, 3):
        result = OPERATIONS[prompt[start]](result, int(prompt[start + 1 : start + 3]))
        answer += f"{result:02d}"
    return answer


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
    signs = "".join(OPERATIONS)
    rows: dict[str, str] = {}
    while len(rows) < num_rows:
        prompt = f"{generator.randrange(MODULUS):02d}"
        for _ in range(NUM_OPERATIONS):
            prompt += f"{generator.choice(signs)}{generator.randrange(MODULUS):02d}"
        prompt += "="
        if split_of(prompt) == split:
            rows[prompt] = solve(prompt)
    return list(rows.items())
