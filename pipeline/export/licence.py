"""The licence of the model that weights or training data came from, and what it asks of a copy.

It is read beside the weights: `license` in the head of README.md, else the text of a LICENSE file.
Meta's Llama licences (https://www.llama.com, LICENSE in each of their repositories) ask, from
version 3 on, that a model made from theirs or from its outputs says "Built with ..." and has a name
that begins with "Llama"; all ask for their notice and a copy of their text.

Left out: advice on law, and every duty that no file can carry out.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import yaml
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from pipeline.models.paths import BUNDLED_MODEL, resolve_model

FILES = ["README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md"]
HEAD = re.compile(r"\A---\n(.*?)\n---", re.DOTALL)
TEXTS = (
    (re.compile(r"llama ([\d.]+) community license agreement", re.IGNORECASE), "llama{}"),
    (re.compile(r"apache license\s+version (2\.0)", re.IGNORECASE), "apache-{}"),
)
OURS = "apache-2.0"
"""Of the bundled model, which is part of this repository."""


@dataclass(frozen=True)
class Licence:
    """A licence and its files beside the weights."""

    name: str | None
    """The Hub's name for it, such as `llama3.2`; None where no file says."""
    files: tuple[Path, ...] = ()
    """Licence, notice and policy, to be copied."""

    @property
    def llama_version(self) -> str | None:
        """`3.2` of Meta's licence for Llama 3.2; None of any other."""
        match = re.fullmatch(r"llama-?([\d.]+)(-community)?", self.name or "")
        return match[1] if match else None

    @property
    def attribution(self) -> str | None:
        """What must be displayed."""
        if self.llama_version in (None, "2"):
            return None
        return "Built with Meta Llama 3" if self.llama_version == "3" else "Built with Llama"

    @property
    def name_prefix(self) -> str:
        """What the name of a model made from it must begin with."""
        if self.llama_version in (None, "2"):
            return ""
        return "Llama-3" if self.llama_version == "3" else "Llama"

    @property
    def notice(self) -> str | None:
        """The line that goes into a file NOTICE."""
        version = self.llama_version
        if version is None:
            return None
        model, licence = (
            ("Meta Llama 3", "Meta Llama 3")
            if version == "3"
            else (f"Llama {version}", f"{'LLAMA' if version == '2' else 'Llama'} {version}")
        )
        return (
            f"{model} is licensed under the {licence} Community License, Copyright (c) Meta "
            "Platforms, Inc. All Rights Reserved."
        )


def find_licence(path: str, key: str, revision: str | None = None) -> Licence:
    """Reads the licence beside a model.

    Args:
        path: `bundled`, a local folder or a Hub id; of the latter what the cache or the Hub gives.
        key: The config key the path came from, for messages.
        revision: Hub revision.

    Raises:
        UserError: The path names no model.
    """
    source = resolve_model(path, key)
    if source == str(BUNDLED_MODEL):
        return Licence(OURS)
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=FILES))
        except (OSError, ValueError, EntryNotFoundError):
            return Licence(None)
    found = {name: folder / name for name in FILES if (folder / name).is_file()}
    card = found.pop("README.md", None)
    texts = [file.read_text(errors="replace") for file in found.values()]
    return Licence(_in_card(card) or _in_texts(texts), tuple(found.values()))


def _in_card(card: Path | None) -> str | None:
    """What the head of a model card says."""
    head = HEAD.match(card.read_text(errors="replace")) if card else None
    if not head:
        return None
    try:
        values = yaml.safe_load(head[1])
    except yaml.YAMLError:
        return None
    values = values if isinstance(values, dict) else {}
    name = values.get("license")
    name = values.get("license_name", name) if name == "other" else name
    return str(name).lower() if name else None


def _in_texts(texts: list[str]) -> str | None:
    """What the first lines of licence texts say."""
    for text in texts:
        for pattern, name in TEXTS:
            match = pattern.search(text[:2000])
            if match:
                return name.format(match[1])
    return None
