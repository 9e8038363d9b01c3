"""The HTML is the Markdown: same words, every picture inlined, and nothing of a user's is live."""

import base64
import re
from html.parser import HTMLParser

import pytest

from pipeline.evaluation.figures import Picture
from pipeline.evaluation.markdown import code_block, escape, picture_link, table
from pipeline.evaluation.page import render_page, write_page

PICTURE = Picture("Up & <down>", b"PNG", '<svg id="wide"/>', '<svg id="narrow"/>')
ATTACKS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</details></td></table><iframe src=//x>",
    "![x](https://x.org/y.png) [x](javascript:alert(1))",
    "<https://x.org> <details open ontoggle=alert(1)>",
    "a|b\r\n# no heading\r- no item\n```\n<style>*{}</style>",
    "`<b>` **no** ~~no~~ &lt;b&gt; $x$ <!-- no --> <br onclick=x>",
    "\\<script>\\`\\|",
)
OURS = {
    "html", "head", "meta", "link", "title", "style", "body", "main", "h1", "h2", "p", "div",
    "table", "thead", "tbody", "tr", "th", "td", "br", "pre", "code", "details", "summary", "span",
    "picture", "source", "img", "em", "strong", "blockquote",
}  # fmt: skip


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_a_model_writes_is_shown_and_does_nothing(attack):
    rows = [["prompt", "answer"], [escape(attack), escape(attack)]]
    quote = f"> **Prompt.** {escape(attack)}"
    text = "\n\n".join([f"# {escape(attack)}", table(rows), quote, code_block(attack, "sh")])
    read = Reader(render_page(text, {}))
    assert set(read.tags) <= OURS
    assert read.tags.count("td") == 2
    assert not {name for name, _ in read.attributes if name.startswith("on")}
    assert [v for n, v in read.attributes if n in ("src", "href")] == ["data:,"]
    shown = "".join("".join(read.text).split())
    assert shown.count("".join(attack.split())) >= 5  # title, heading, two cells, quote, code


@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if "![" not in attack])
def test_even_text_that_nobody_escaped_is_not_live(attack):
    read = Reader(render_page(f"# Title\n\n{attack}\n\nwords {attack}\n", {}))
    assert set(read.tags) <= OURS | {"a", "li", "ul"}
    assert not {name for name, _ in read.attributes if name.startswith("on")}
    links = [value for name, value in read.attributes if name in ("src", "href")]
    assert all(value == "data:," or value.startswith("https://x.org") for value in links)


def test_every_picture_is_inlined_for_light_dark_wide_and_narrow():
    page = render_page(f"# T\n\n{picture_link('plots/a.png', PICTURE)}\n", {"plots/a.png": PICTURE})
    found = re.findall(
        r'(?:media="([^"]*)" srcset|<img src)="data:image/svg\+xml;base64,(.*?)"', page
    )
    names = [re.search('id="(.*?)"', base64.b64decode(data).decode())[1] for _, data in found]
    assert [media for media, _ in found] == [
        "(max-width: 34rem) and (prefers-color-scheme: dark)",
        "(max-width: 34rem)",
        "(prefers-color-scheme: dark)",
        "",
    ]
    assert names == ["narrow", "narrow", "wide", "wide"]
    assert "Up &amp; &lt;down&gt;" in page
    assert "plots/a.png" not in page


def test_a_picture_that_is_not_there_is_an_error():
    with pytest.raises(KeyError):
        render_page("# T\n\n![x](plots/b.png)\n", {})


def test_nothing_is_loaded_from_elsewhere(tmp_path):
    write_page(tmp_path / "report.md", "# T\n\n[a page](table.html)\n", {})
    page = (tmp_path / "report.html").read_text()
    assert "default-src 'none'" in page
    assert "<script" not in page
    assert not re.search(r"""(?:src|srcset|url)\s*[=(]\s*["']?(?!data:)""", page)


def test_tables_scroll_and_marks_are_coloured():
    rows = [["a", "b"], ["✓ yes it is", "✗ no"], ["9.0 % [8.6, 9.5]", "-9.0 % [-8.6, +9.5]"]]
    page = render_page("# T\n\n" + table(rows), {}).replace("\N{NO-BREAK SPACE}", "_")
    assert '<div class="scroll" tabindex="0"' in page
    assert '<td class="right">✓_yes it is</td>' in page
    assert '<td class="wrong">✗_no</td>' in page


def test_details_open_and_close():
    page = render_page("# T\n\n<details><summary>9 steps</summary>\n\nx\n\n</details>\n", {})
    assert "<details><summary>9 steps</summary>" in page
    assert page.count("<details>") == page.count("</details>") == 1
