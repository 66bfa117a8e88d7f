"""The timeline as text, letter by letter, and as a picture that holds its colours."""

import sys

import pytest

from fxaccel.errors import OptionError
from fxaccel.pipeline.orders import order
from fxaccel.pipeline.simulator import Link, Stage, simulate
from fxaccel.pipeline.timeline import COLOURS, lines, picture


def test_the_lines_of_a_small_pipeline():
    stage = Stage(2, 2, 2, sends=5, saved=3, fixed=10)
    assert lines(simulate(order("1F1B", 2, 2), [stage] * 2), 36) == [
        "rank 0 |F0--F1--........B0------....B1------|",
        "rank 1 |....F0--B0------F1--B1------........|",
        "18 s, bubble 50.0%, 10 bytes sent, at most 20 bytes on rank 1",
        "rank 0  busy 66.7%, peak 16 bytes",
        "rank 1  busy 66.7%, peak 20 bytes",
    ]


def test_the_parts_of_a_backward_and_a_ranks_second_stage():
    found = simulate(order("ZBVZeroBubble", 2, 3), [Stage(1, 1, 1)] * 4)
    shown = lines(found, 3 * round(found.seconds))
    assert shown[0].startswith("rank 0 |F0-F1-F2-f0-i0-w0-f1-i1-w1-I0-W0-")


def test_blocks_shorter_than_a_column_and_a_step_of_no_time():
    shown = lines(simulate(order("GPipe", 2, 40), [Stage(1, 1, 1)] * 2, Link(1)), 20)
    assert all(len(line) == len("rank 0 ||") + 20 for line in shown[:2])
    assert lines(simulate(order("GPipe", 1, 1), [Stage(0, 0, 0)]), 3)[0] == "rank 0 |...|"
    with pytest.raises(OptionError, match="expected a width of 1 or more, came 0"):
        lines(simulate(order("GPipe", 1, 1), [Stage(1, 1, 1)]), 0)


@pytest.mark.parametrize(("schedule", "kinds"), [("1F1B", "FB"), ("InterleavedZeroBubble", "FIW")])
def test_a_picture(tmp_path, schedule, kinds):
    found = simulate(order(schedule, 3, 6), [Stage(1, 1, 1)] * 3)
    picture(found, tmp_path / "one.svg")
    text = (tmp_path / "one.svg").read_text()
    assert {k for k, colour in COLOURS.items() if colour in text} == set(kinds)
    picture(found, str(tmp_path / "one.png"))
    assert (tmp_path / "one.png").read_bytes()[:4] == b"\x89PNG"


def test_other_files_and_no_matplotlib_are_refused(tmp_path, monkeypatch):
    found = simulate(order("GPipe", 1, 1), [Stage(1, 1, 1)])
    with pytest.raises(OptionError, match=r"one.txt ends in '.txt', expected one of .svg, .png"):
        picture(found, tmp_path / "one.txt")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(OptionError, match=r"not installed\nhint: pip install 'fxaccel\[plot\]'"):
        picture(found, tmp_path / "one.svg")
    assert not list(tmp_path.iterdir())
