"""Where in the user's model an error is raised that generated code raises: module, line, and the pass."""

from __future__ import annotations

import linecache
import re
import traceback

_GENERATED = re.compile(r"fxaccel .* #\d+")  # what fxaccel.emit calls the files of its code
_HEAD = "of the accelerated model: "


def locate(error: BaseException) -> None:
    """Add a note to an error that has come out of generated code, with what its statement computes.

    Once: what has a note already was raised by code within code. Before Python 3.11 errors take no notes,
    and the traceback's own line, which ends in the same words, has to do.
    """
    if not hasattr(error, "add_note") or any(n.startswith(_HEAD) for n in getattr(error, "__notes__", ())):
        return
    for frame, number in reversed(list(traceback.walk_tb(error.__traceback__))):
        if _GENERATED.fullmatch(frame.f_code.co_filename):
            line = linecache.getline(frame.f_code.co_filename, number)
            _, comment, where = line.rstrip("\n").rpartition("  # ")
            if comment:
                error.add_note(f"{_HEAD}{where}")
                return
