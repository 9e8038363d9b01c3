"""The plan of a run as text: facts, one a line, and the table of memory."""

from collections.abc import Sequence

from pipeline.doctor.plan import Launch, Row

COLUMNS = ("weights", "gradients", "optimizer", "movement", "teacher", "pass", "sampling", "total")


def size_text(num_bytes: float) -> str:
    """`1.5 GB`, `20 MB`."""
    giga = num_bytes >= 1e9
    return f"{num_bytes / (1e9 if giga else 1e6):.{1 if giga else 0}f} {'GB' if giga else 'MB'}"


def count_text(count: float) -> str:
    """`1.24 B`, `0.80 M`."""
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def fact_lines(facts: Sequence[tuple[str, str]]) -> list[str]:
    """Names and what is said of them, one a line."""
    width = max(len(name) for name, _ in facts) + 2
    return [f"{name:<{width}}{text}" for name, text in facts]


def memory_lines(stage: str, rows: Sequence[Row], launch: Launch) -> list[str]:
    """The table of memory, the launched layout marked.

    Args:
        stage: The one whose memory it is.
        rows: One for each layout and number of ranks.
        launch: What was launched.
    """
    unit, power = ("GB", 1e9) if max(row.total for row in rows) >= 1e9 else ("MB", 1e6)
    has_host = any(row.host for row in rows)
    columns = (*COLUMNS, "host") if has_host else COLUMNS
    lines = [
        f"memory of one rank in {stage}, in {unit}, by arithmetic (pipeline/doctor/memory.py);",
        "total = what stays + the larger of pass and sampling; > is this launch",
        " " * 18 + "".join(f"{name:>10}" for name in columns),
    ]
    for row in rows:
        is_launched = row.layout == launch.layout and row.num_ranks == launch.num_ranks
        ranks = f"{row.num_ranks} rank{'s' if row.num_ranks > 1 else ''}"
        states = row.states
        values = [
            states.weights,
            states.gradients,
            states.optimizer,
            states.sparsity,
            row.teacher,
            row.training,
            row.sampling,
            row.total,
            *([row.host] if has_host else []),
        ]
        numbers = "".join(f"{value / power:>10.1f}" for value in values)
        lines.append(f"{'>' if is_launched else ' '} {row.layout:<7}{ranks:<9}{numbers}")
    return lines
