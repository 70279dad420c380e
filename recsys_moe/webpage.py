"""Pages that need nothing but themselves: pictures inside, no script, nothing from elsewhere; text is escaped."""

import base64
import html
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 1200px; margin: 0 auto;
       padding: 1rem 1.5rem 4rem }
h1 { font-size: 1.6rem; overflow-wrap: anywhere }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc }
nav a { margin-right: 1.2em }
p { max-width: 52rem }
figure { margin: 1rem 0 }
img { max-width: 100%; height: auto }
summary { cursor: pointer; margin: .6rem 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #ddd; text-align: right }
th { border-bottom: 2px solid #888; vertical-align: bottom }
th:first-child, td:first-child { text-align: left }
.warning { border-left: .3rem solid #d55e00; background: #fdf1e8; padding: .5rem 1rem; margin: .5rem 0 }
.well { border-left: .3rem solid #009e73; background: #eaf6f2; padding: .5rem 1rem }
"""


def web_page(title: str, body: str) -> str:
    """A whole page; `title` is text, `body` is HTML.

    >>> "<title>a &lt;b&gt;</title>" in web_page("a <b>", "<p>c</p>")
    True
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
{body}
</body>
</html>
"""


def web_image(figure: "Figure", says: str) -> str:
    """A picture, and what it says to those who can't see it; call it inside of `pictures.drawing`."""
    from recsys_moe.pictures import render  # matplotlib

    data = base64.b64encode(render(figure)).decode()
    return f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(says)}"></figure>'


def web_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns.

    >>> web_table(["a"], [["<"]])
    '<div class="scroll"><table><thead><tr><th>a</th></tr></thead><tbody><tr><td>&lt;</td></tr></tbody></table></div>'
    """

    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="scroll"><table><thead>{line(header, "th")}</thead><tbody>{body}</tbody></table></div>'
