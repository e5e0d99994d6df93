"""The parts that every page is made of: frame, style sheet, tables. Nothing on a page comes from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# nothing may be fetched, and no script may run, whatever text a run has brought into its page
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"

# colours of series and phases; every pair of text and ground has a contrast of at least 4.5, of lines at least 3
_STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f5f6f8; --text: #1a1d21; --quiet: #555c66; --line: #cfd4da;
  --link: #0b5cad; --c0: #0b62a8; --c1: #b3470a; --c2: #1b7a4b; --c3: #8a3a9a; --c4: #7a6000; --c5: #a0204c;
  --queued: #9aa3ad; --start: #d19a00; --compile: #8a3a9a; --step: #1b7a4b; --evaluate: #0b62a8; --save: #00838f;
  --lost: #c62828; --other: #6b7280; }
@media (prefers-color-scheme: dark) { :root { --ground: #14171b; --card: #1e2228; --text: #e8eaed; --quiet: #a9b1bb;
  --line: #3a414a; --link: #7cb8ff; --c0: #6cb6ff; --c1: #ffab70; --c2: #56d39a; --c3: #d8a0f0; --c4: #e6cf5a;
  --c5: #ff8fab; --queued: #78828e; --start: #e0b03a; --compile: #c58be0; --step: #3fae78; --evaluate: #4f9be8;
  --save: #35b5c2; --lost: #ff6b6b; --other: #9aa3ad; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.35rem; margin-top: 2.2rem;
  border-top: 1px solid var(--line); padding-top: 1rem; } h3 { font-size: 1.05rem; margin: 1.6rem 0 .5rem; }
a { color: var(--link); } p { margin: .4rem 0; max-width: 75ch; } .quiet { color: var(--quiet); }
.scroll { overflow-x: auto; } .scroll:focus-visible, summary:focus-visible, a:focus-visible {
  outline: 2px solid var(--link); outline-offset: 2px; }
/* `anywhere` would let columns shrink to a letter */
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; overflow-wrap: break-word; }
thead th { white-space: nowrap; }
caption { text-align: left; color: var(--quiet); padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); }
td { min-width: 3rem; } td.long { min-width: 14rem; overflow-wrap: anywhere; } td.number, th.number { text-align: right;
  overflow-wrap: normal; white-space: nowrap; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; padding: 10px; background: var(--card); border-radius: 8px; } figure svg, figure img {
  display: block; max-width: 100%; height: auto; } figure svg { width: 100%; } figcaption { font-size: .85rem; }
figcaption strong { font-size: .95rem; }
.legend { list-style: none; margin: .2rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem .9rem; }
.legend svg { display: inline-block; width: 26px; height: 8px; margin-right: .3rem; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: .35rem; }
svg text { fill: var(--quiet); font: 11px system-ui, sans-serif; } .axis { stroke: var(--line); }
.mark { stroke: var(--quiet); stroke-dasharray: 2 3; } .series { fill: none; stroke-width: 1.8; }
.bar { position: relative; height: 26px; background: var(--card); border-radius: 4px; overflow: hidden;
  margin: 2px 0 8px; }
.bar i { position: absolute; top: 0; bottom: 0; } pre { background: var(--card); padding: 10px; border-radius: 8px;
  overflow-x: auto; font-size: .82rem; overflow-wrap: normal; } summary { cursor: pointer; padding: .4rem 0; }
@media print { .scroll, pre { overflow: visible; } }
"""


def page(title: str, body: str) -> str:
    """A whole document; `body` is HTML."""
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[str]], links: Sequence[str] = ()) -> str:
    """A table of plain text, which scrolls by itself where it is too wide.

    links: a target for the first cell of each row, empty for none.
    """
    numeric = [all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    head = "".join(f'<th scope="col"{_kind(numeric[i], "")}>{escape(name)}</th>' for i, name in enumerate(columns))
    lines = []
    for r, row in enumerate(rows):
        cells = [f"<td{_kind(numeric[i], cell)}>{escape(cell)}</td>" for i, cell in enumerate(row)]
        name = escape(row[0])
        if links and links[r]:
            name = f'<a href="{escape(links[r])}">{name}</a>'
        cells[0] = f'<th scope="row">{name}</th>'
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _kind(numeric: bool, cell: str) -> str:
    return ' class="number"' if numeric else ' class="long"' if len(cell) > 40 else ""


def _is_number(cell: str) -> bool:
    return not cell or cell == "-" or cell[0].isdigit() or cell[0] in "+-"
