"""Rules on exports: what a format needs of the mask, and what is uploaded."""

from collections.abc import Iterator

from pipeline.config import Config
from pipeline.rules.fault import Fault

FITS_2_4 = ("1:4", "2:4")


def export_faults(config: Config) -> Iterator[Fault]:
    """A format that the mask of this config cannot fit, and an upload of nothing."""
    export = config.export
    asked = "export" in config.run.stages
    if asked and "semi_structured" in export.formats and config.prune.scope not in FITS_2_4:
        yield Fault(
            "export.formats",
            export.formats,
            f"semi_structured needs a 2:4 mask, and prune.scope is {config.prune.scope}",
            "leave semi_structured out, or set prune.scope: 2:4, instead",
            ("prune.scope", "run.stages"),
        )
    if export.push_to_hub and "hf" not in export.formats:
        yield Fault(
            "export.push_to_hub",
            export.push_to_hub,
            "uploads the format hf, which export.formats does not have",
            "add hf to export.formats, or set null, instead",
            ("export.formats",),
        )
