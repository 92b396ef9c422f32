"""One HTML page that needs nothing from elsewhere: style, pictures and tables stand in it."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

__all__ = ["html_page", "html_picture"]

_MIME = {".svg": "image/svg+xml", ".png": "image/png"}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 68rem; margin: 2rem auto; padding: 0 1.2rem }
h1 { font-size: 1.6rem }
h2 { margin-top: 2.6rem; border-bottom: 1px solid #ccc }
h3 { margin: 1.6rem 0 .4rem; font-size: 1rem }
table { border-collapse: collapse; font-size: .82rem; font-variant-numeric: tabular-nums }
th, td { padding: .22rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
thead th { border-bottom: 2px solid #888 }
tr.published td { color: #666; font-style: italic }
.wide { overflow-x: auto }
.note, figcaption { color: #555; font-size: .82rem; max-width: 60rem }
figure { margin: 1.2rem 0 }
img { max-width: 100% }
dt { font-weight: 600; float: left; width: 4rem }
dd { margin-left: 4rem }
@media print {
  body { max-width: none; margin: 0; font-size: 11px }
  figure, tr { break-inside: avoid }
  .wide { overflow: visible }
  table { font-size: 8px }
}
""".strip()


def html_picture(title: str, path: Path) -> str:
    """Embed a PNG or an SVG, with its title below it and for those who cannot see it."""
    content = base64.b64encode(path.read_bytes()).decode()
    source = f"data:{_MIME[path.suffix]};base64,{content}"
    text = html.escape(title)
    return f'<figure><img alt="{text}" src="{source}"><figcaption>{text}</figcaption></figure>'


def html_page(title: str, parts: Sequence[str]) -> str:
    """Make a whole document of parts that are HTML already, a line each."""
    head = (
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
    )
    return "\n".join(["<!doctype html>", *head, *parts, "</body></html>", ""])
