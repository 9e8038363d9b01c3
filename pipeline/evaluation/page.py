"""A page in two forms from one text: Markdown, and a single HTML file that needs nothing else.

The HTML is the Markdown, rendered by markdown-it, so the two cannot disagree. Its pictures are
inlined as SVG: one for each of light and dark, wide and narrow, between which the browser chooses.
There is no script, and a content security policy allows none.

Texts of users and models go through `markdown.escape`. Should one slip by, nothing is lost: of
raw HTML only the tags that the pages themselves use pass (`OWN_TAGS`), all else is shown as text.
"""

import base64
import re
from collections.abc import Mapping, Sequence
from html import escape as escape_html
from importlib.resources import files
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token

from pipeline.artifacts import write_text
from pipeline.evaluation.figures import Picture, for_dark_page, write_picture

OWN_TAGS = re.compile(r"<details><summary>[\w ,]*</summary>|</details>|<br>")
NARROW = "(max-width: 34rem)"
DARK = "(prefers-color-scheme: dark)"
UNBROKEN = re.compile(r"(?<=^[✓✗]) |(?<=,) (?=[+-]?[\d.]+\])")
"""Blanks that end no line: after a mark, and within an interval."""
MARKS = {"✓": "right", "✗": "wrong"}
"""First character of a cell to the class that colours it."""
SHELL = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""


def write_page(path: Path, markdown: str, pictures: Mapping[str, Picture]) -> None:
    """Writes a page's `.md`, its `.html` beside it, and the PNGs that the Markdown shows.

    Args:
        path: Of the Markdown.
        markdown: Begins with a heading of level 1.
        pictures: Path relative to the page's folder, as the Markdown has it, to picture.
    """
    for name, picture in pictures.items():
        write_picture(picture, path.parent / name)
    write_text(path, markdown)
    write_text(path.with_suffix(".html"), render_page(markdown, pictures))


def render_page(markdown: str, pictures: Mapping[str, Picture]) -> str:
    """The HTML of a page.

    Raises:
        KeyError: The Markdown shows a picture that is not there.
    """
    renderer = MarkdownIt("commonmark").enable("table")
    for name, rule in RULES.items():
        renderer.add_render_rule(name, rule)
    body = renderer.render(markdown, {"pictures": pictures})
    title = re.sub(r"\\(.)", r"\1", markdown.partition("\n")[0].removeprefix("# "))
    style = (files("pipeline.evaluation") / "page.css").read_text(encoding="utf-8")
    return SHELL.format(title=escape_html(title), style=style, body=body)


def _raw_html(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: dict
) -> str:
    """Our own tags as they are, anything else as text."""
    content = tokens[index].content
    return content if OWN_TAGS.fullmatch(content.strip()) else escape_html(content)


def _text(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: dict
) -> str:
    return escape_html(UNBROKEN.sub("\N{NO-BREAK SPACE}", tokens[index].content))


def _image(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: dict
) -> str:
    """The picture under its sentence, which is the alternative text of the Markdown."""
    picture = env["pictures"][tokens[index].attrs["src"]]
    sources = [
        (f"{NARROW} and {DARK}", for_dark_page(picture.narrow)),
        (NARROW, picture.narrow),
        (DARK, for_dark_page(picture.wide)),
    ]
    listed = "".join(f'<source media="{when}" srcset="{_inline(svg)}">' for when, svg in sources)
    image = f'<img src="{_inline(picture.wide)}" alt="">'
    caption = escape_html(picture.title.replace(" %", "\N{NO-BREAK SPACE}%"))
    return (
        f'<span class="figure" role="figure"><span class="caption">{caption}</span>'
        f"<picture>{listed}{image}</picture></span>"
    )


def _inline(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _table_open(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: dict
) -> str:
    """A table scrolls by itself where the window is too narrow for it, by keyboard too."""
    return '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>\n'


def _table_close(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: dict
) -> str:
    return "</table></div>\n"


def _cell_open(
    renderer: RendererHTML, tokens: Sequence[Token], index: int, options: Any, env: dict
) -> str:
    """A cell, with a class where it begins with a mark."""
    kind = MARKS.get(tokens[index + 1].content[:1])
    return f'<td class="{kind}">' if kind else "<td>"


RULES = {
    "html_block": _raw_html,
    "html_inline": _raw_html,
    "text": _text,
    "image": _image,
    "table_open": _table_open,
    "table_close": _table_close,
    "td_open": _cell_open,
}
