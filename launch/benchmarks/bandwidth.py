"""What the memory of this machine gives: copy and triad of STREAM (McCalpin 1995), with torch.

    copy    c = a           8 bytes an fp32 element
    triad   c = a + s b    12 bytes
    update  a = a + s b    12 bytes

Counted are the bytes the program names, as everywhere in this suite. A cache reads a line before it
overwrites it, so copy and triad move 4 more; an update, like an optimizer, does not. It is what
the steps are compared with.
"""

import torch

from launch.benchmarks.timing import Side, alternate, summary

NUM_ELEMENTS = 2**26
"""256 MiB an operand, far more than a cache holds."""


def bandwidth(device: torch.device, num_rounds: int) -> dict[str, dict[str, float]]:
    """Bytes per second of copy, triad and update, with the threads that torch has now."""
    a, b = (torch.ones(NUM_ELEMENTS, device=device) for _ in range(2))
    c = torch.empty_like(a)
    taken = alternate(
        {
            "copy": Side(lambda: c.copy_(a)),
            "triad": Side(lambda: torch.add(a, b, alpha=2.0, out=c)),
            "update": Side(lambda: a.add_(b, alpha=0.5)),
        },
        device,
        num_rounds,
    )
    bytes_moved = {
        "copy": 8 * NUM_ELEMENTS,
        "triad": 12 * NUM_ELEMENTS,
        "update": 12 * NUM_ELEMENTS,
    }
    return {
        name: summary([bytes_moved[name] / second for second in values])
        for name, values in taken.items()
    }
