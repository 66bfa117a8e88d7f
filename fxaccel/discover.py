"""Find passes by name: our own by walking `fxaccel.passes`, others by decorator or entry point.

A third-party package offers passes under the entry-point group `fxaccel.passes`; each entry names a
module that registers its passes on import, or a Pass class.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any

from fxaccel.errors import FxaccelError, OptionError
from fxaccel.rule import Pass, registered

GROUP = "fxaccel.passes"


def available() -> dict[str, type[Pass]]:
    """Every pass that can be named here, ours and others', by name."""
    package = importlib.import_module(GROUP)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{GROUP}.{module.name}")
    for entry in entry_points(group=GROUP):
        try:
            entry.load()
        except Exception as error:  # another package's defect must not hide its name
            raise OptionError(
                f"the entry point {entry.name!r} ({entry.value}) cannot be imported: "
                f"{type(error).__name__}: {error}",
                "uninstall or repair the package that offers it",
            ) from error
    return dict(sorted(registered().items()))


def resolve(passes: Iterable[str | Pass | type[Pass]] | None) -> list[Pass]:
    """Pass instances from names ("fuse-norm{where=layers.*}"), classes and instances; None: the defaults."""
    if passes is None:
        return [_made(cls) for cls in available().values() if cls.default]
    if isinstance(passes, str):
        raise OptionError(f"passes= is the string {passes!r}, expected a list", f"passes=[{passes!r}]")
    given = list(passes)
    known = available() if any(isinstance(p, str) for p in given) else {}  # looked for once
    return [_one(p, known) for p in given]


def _one(given: str | Pass | type[Pass], known: Mapping[str, type[Pass]]) -> Pass:
    if isinstance(given, Pass):
        return given
    if isinstance(given, type) and issubclass(given, Pass):
        return _made(given)
    if isinstance(given, str):
        return _parsed(given, known)
    raise OptionError(f"passes= holds {given!r}, expected names, Pass classes or Pass instances")


def parse(text: str) -> Pass:
    """A pass from its typed form: `name` or `name{option=value,...}`."""
    return _parsed(text, available())


def _parsed(text: str, passes: Mapping[str, type[Pass]]) -> Pass:
    form = re.fullmatch(r"\s*([\w-]+)\s*(?:\{(.*)\})?\s*", text)
    if form is None:
        raise OptionError(f"{text!r} is not a pass", "write name or name{option=value,...}")
    name, options = form[1], form[2] or ""
    if name not in passes:
        close = get_close_matches(name, passes, 1)
        raise OptionError(
            f"there is no pass {name!r}",
            f"did you mean {close[0]!r}?" if close else f"there are {list(passes)}",
        )
    cls = passes[name]
    fields = {f.name: f for f in dataclasses.fields(cls)}
    values: dict[str, Any] = {}
    for part in _split(options):
        key, equals, value = (w.strip() for w in part.partition("="))
        if not equals or key not in fields:
            raise OptionError(f"pass {name!r} has no option {key!r}", f"it has {sorted(fields)}")
        values[key] = _value(name, fields[key], value)
    return _made(cls, **values)


def _made(cls: type[Pass], **options: Any) -> Pass:
    """An instance; what a stranger's `__post_init__` raises is an error of its options."""
    try:
        return cls(**options)
    except FxaccelError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise OptionError(f"pass {cls.name!r} cannot be made with the options {options}: {what}") from error


def _split(text: str) -> Sequence[str]:
    return [p for p in re.split(r",(?![^(\[]*[)\]])", text) if p.strip()]


def _value(name: str, field: Any, text: str) -> Any:
    """`text` as the field's type."""
    kind = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    try:
        if "bool" in kind and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if "bool" in kind and "str" not in kind:
            raise ValueError(text)
        if text.lower() == "none" and "None" in kind:
            return None
        for word, make in (("int", int), ("float", float)):
            if re.search(rf"\b{word}\b", kind) and "str" not in kind:
                return make(text)
    except ValueError:
        raise OptionError(f"option {field.name!r} of pass {name!r} is {text!r}, expected {kind}") from None
    return text.strip("'\"")
