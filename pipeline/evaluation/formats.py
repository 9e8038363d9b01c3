"""How reports and pictures write numbers."""


def percent(fraction: float) -> str:
    """`0.9` as `90.0 %`."""
    return f"{100 * fraction:.1f} %"


def number(value: float) -> str:
    """Three significant digits, whole numbers from 1,000 on."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
