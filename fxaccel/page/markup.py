"""HTML as text: everything that comes from outside is escaped here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content = str | Iterable[str]
"""A text, which is escaped unless it is Markup, or several of them."""

VOID = {"input", "meta"}


def joined(content: Content) -> Markup:
    """The content, escaped."""
    parts = [content] if isinstance(content, str) else content
    return Markup("".join(p if isinstance(p, Markup) else escape(p) for p in parts))


def tag(name: str, content: Content = "", **attributes: str | bool) -> Markup:
    """An element; `cls` is its class, True an attribute without a value, False and "" none."""
    words = [name]
    for key, value in attributes.items():
        word = {"cls": "class"}.get(key, key.replace("_", "-"))
        if value is True:
            words.append(word)
        elif value is not False and value != "":
            words.append(f'{word}="{escape(value)}"')
    return Markup(f"<{' '.join(words)}>" + ("" if name in VOID else f"{joined(content)}</{name}>"))


def folded(
    summary: Content, content: Content, cls: str = "", opened: bool = False, **attributes: str
) -> Markup:
    """Content that is shown when its summary is clicked."""
    inner = [tag("summary", summary), tag("div", content)]
    return tag("details", inner, cls=cls, open=opened, **attributes)


def table(head: Iterable[str], rows: Iterable[Iterable[str]], cls: str = "") -> Markup:
    """A table of cells with a row of titles."""
    top = tag("tr", [tag("th", cell) for cell in head])
    body = [tag("tr", [tag("td", cell) for cell in row]) for row in rows]
    return tag("table", [tag("thead", top), tag("tbody", body)], cls=cls)


def count(number: int, one: str, many: str = "") -> str:
    """3 sites, 1 site."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
