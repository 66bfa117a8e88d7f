"""Pictures: of those who plan, drawn with matplotlib, an optional extra, without a display; and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxaccel.errors import OptionError

SUFFIXES = (".svg", ".png")


@dataclass(frozen=True)
class Picture:
    """What a pass has to show in a page.

    svg      text that is put into the page as it is: what comes from the model is escaped in it
    lines    what is said below the title
    """

    title: str
    svg: str
    lines: Sequence[str] = ()


def drawable(file: Path) -> None:
    """Raise OptionError for a file that no picture can be written to."""
    if file.suffix not in SUFFIXES:
        raise OptionError(f"{file} ends in {file.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise OptionError(
            "a picture is drawn with matplotlib, which is not installed", "pip install 'fxaccel[plot]'"
        ) from None


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def saved(figure: Any, file: Path) -> None:
    """Write the picture; equal figures give equal files."""
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
