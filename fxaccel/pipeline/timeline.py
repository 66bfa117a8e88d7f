"""A simulated step as lines of text and as a picture: one row a rank, time from left to right."""

from __future__ import annotations

from pathlib import Path

from fxaccel import svg
from fxaccel.errors import OptionError
from fxaccel.picture import SUFFIXES, canvas, drawable, saved
from fxaccel.pipeline.simulator import Event, Simulated

IDLE = "."
COLOURS = {"F": "#4c78a8", "B": "#54a24b", "I": "#72b7b2", "W": "#f58518"}
NAMES = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weights"}


def lines(simulated: Simulated, width: int = 100) -> list[str]:
    """The timeline in `width` columns, then what it comes to.

    A block is its action's letter and microbatch, filled up with dashes; small letters are a rank's later
    stages. What is shorter than a column may be hidden by what follows it.
    """
    if width < 1:
        raise OptionError(f"expected a width of 1 or more, came {width}")
    ranks = len(simulated.memory)
    rows = [[IDLE] * width for _ in range(ranks)]
    scale = width / simulated.seconds if simulated.seconds else 0.0
    for event in simulated.events:
        start, end = round(event.start * scale), round(event.end * scale)
        rows[event.rank][start:end] = _label(simulated, event).ljust(end - start, "-")[: end - start]
    wide, most, sent = len(str(ranks - 1)), max(simulated.peaks), sum(simulated.sent.values())
    shares = [busy / simulated.seconds if simulated.seconds else 0.0 for busy in simulated.busy]
    return [
        *(f"rank {rank:{wide}} |{''.join(row)}|" for rank, row in enumerate(rows)),
        f"{simulated.seconds:.6g} s, bubble {simulated.bubble:.1%}, {sent} bytes sent, "
        f"at most {most} bytes on rank {simulated.peaks.index(most)}",
        *(
            f"rank {rank:{wide}}  busy {share:.1%}, peak {peak} bytes"
            for rank, (share, peak) in enumerate(zip(shares, simulated.peaks, strict=True))
        ),
    ]


def _label(simulated: Simulated, event: Event) -> str:
    kind = event.action.kind
    return f"{kind.lower() if _chunk(simulated, event) else kind}{event.action.microbatch}"


def _chunk(simulated: Simulated, event: Event) -> int:
    """How many earlier stages its rank has."""
    return simulated.order.placement[: event.action.stage].count(event.rank)


def check_drawable(path: Path) -> None:
    """Raise OptionError for a file that `write` cannot write."""
    expected = (*SUFFIXES, ".txt")
    if path.suffix not in expected:
        raise OptionError(f"{path} ends in {path.suffix!r}, expected one of {', '.join(expected)}")
    if path.suffix != ".txt":
        drawable(path)


def write(simulated: Simulated, path: Path) -> None:
    """Write the timeline to a file: as a picture, or as text to one that ends in .txt."""
    check_drawable(path)
    if path.suffix == ".txt":
        path.write_text("\n".join(lines(simulated)) + "\n")
    else:
        picture(simulated, path)


def drawn(simulated: Simulated) -> str:
    """The timeline as SVG text, without matplotlib; a rank's later stages are paler."""
    unit, name = (1e3, "ms") if simulated.seconds < 1 else (1.0, "s")
    found = [
        svg.Bar(e.rank, unit * e.start, unit * e.end, COLOURS[e.action.kind],
                0.35 + 0.65 / (1 + _chunk(simulated, e)), str(e.action.microbatch))
        for e in simulated.events
    ]  # fmt: skip
    kinds = [k for k in COLOURS if any(e.action.kind == k for e in simulated.events)]
    rows = [f"rank {r}" for r in range(len(simulated.memory))]
    return svg.bars(rows, found, name, [(COLOURS[k], NAMES[k]) for k in kinds])


def picture(simulated: Simulated, path: str | Path) -> None:
    """Write the timeline to a file, .svg or .png; a rank's later stages are paler."""
    path = Path(path)
    drawable(path)
    from matplotlib.patches import Patch

    ranks = len(simulated.memory)
    figure, axes = canvas(12, 1.5 + 0.45 * ranks)
    for event in simulated.events:
        length = event.end - event.start
        pale = 1 / (1 + _chunk(simulated, event))
        axes.barh(
            event.rank, length, 0.9, event.start, color=COLOURS[event.action.kind], alpha=0.35 + 0.65 * pale,
            edgecolor="white", linewidth=0.5,
        )  # fmt: skip
        if length > simulated.seconds / 60:
            middle = event.start + length / 2
            axes.text(middle, event.rank, str(event.action.microbatch), ha="center", va="center", fontsize=7)
    kinds = [k for k in COLOURS if any(e.action.kind == k for e in simulated.events)]
    axes.legend(
        handles=[Patch(color=COLOURS[k], label=NAMES[k]) for k in kinds], loc="upper center",
        bbox_to_anchor=(0.5, -0.25), ncols=len(kinds), frameon=False,
    )  # fmt: skip
    axes.set_yticks(range(ranks), [f"rank {r}" for r in range(ranks)])
    axes.invert_yaxis()
    axes.set_xlim(0, simulated.seconds or 1)
    axes.set_xlabel("seconds")
    axes.set_title(f"{simulated.order.schedule}: bubble {simulated.bubble:.1%}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    saved(figure, path)
