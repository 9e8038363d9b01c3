"""How reports and pictures write numbers."""

from collections.abc import Sequence


def percent(fraction: float) -> str:
    """`0.9` as `90.0 %`."""
    return f"{100 * fraction:.1f} %"


def percent_within(fraction: float, interval: Sequence[float]) -> str:
    """A fraction with its interval: `93.0 % [88.6, 95.8]`."""
    low, high = interval
    return f"{percent(fraction)} [{100 * low:.1f}, {100 * high:.1f}]"


def number(value: float) -> str:
    """Three significant digits, whole numbers from 1,000 on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def perplexity_text(value: float) -> str:
    """Three decimals up to 10, since a perplexity stands on 1; then as `number`."""
    return f"{value:.3f}" if value < 10 else number(value)


def duration(seconds: float) -> str:
    """`325` as `5 min 25 s`, `9000` as `2 h 30 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{number(seconds)} s"
