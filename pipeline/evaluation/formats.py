"""How reports and pictures write numbers."""


def percent(fraction: float) -> str:
    """`0.9` as `90.0 %`."""
    return f"{100 * fraction:.1f} %"


def number(value: float) -> str:
    """Three significant digits, whole numbers from 1,000 on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    """`325` as `5 min 25 s`, `9000` as `2 h 30 min`."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{number(seconds)} s"
