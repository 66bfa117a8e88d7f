"""The `fxaccel` command: passes, diff, explain, verify, bisect, bench, plan.

Exit codes: 0 nothing differs (or all is proved), 1 something differs (or a proof failed), 2 an error.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text
from torch import nn

import fxaccel
from fxaccel.capture import Call
from fxaccel.discover import available, resolve
from fxaccel.errors import FxaccelError, OptionError
from fxaccel.gains import gains
from fxaccel.module import call_of
from fxaccel.picture import drawable
from fxaccel.pipeline.orders import named
from fxaccel.pipeline.timeline import check_drawable
from fxaccel.report import PassReport, Report, Site

app = typer.Typer(
    help="Verified rewrites of PyTorch models.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip

Model = Annotated[str, typer.Argument(help="package.module:callable, or a file that fast.save() wrote")]
Passes = Annotated[
    list[str] | None, typer.Option("--pass", "-p", help="name or name{option=value,...}; repeat for more")
]
Inputs = Annotated[
    list[str] | None, typer.Option("--input", "-i", help="input_ids=int64[2,128]; repeat for more")
]
Load = Annotated[
    list[Path] | None, typer.Option("--load", help="Python file that registers passes; repeat for more")
]
Train = Annotated[bool, typer.Option("--train/--eval", help="mode to capture in")]
AsJson = Annotated[bool, typer.Option("--json", help="machine-readable output")]
Measure = Annotated[
    bool, typer.Option("--measure", help="leave out what is slower here, as accelerate() does by default")
]
Allow = Annotated[str, typer.Option(help="loosest numerics class that a pass may have")]
Debug = Annotated[bool, typer.Option("--debug", help="show a traceback on errors")]

_console = Console(highlight=False, soft_wrap=True)
_errors = Console(stderr=True, highlight=False, soft_wrap=True)


@app.command()
def passes(load: Load = None, as_json: AsJson = False, debug: Debug = False) -> None:
    """What passes there are, with numerics class and one line each."""
    with _reported(debug):
        _load(load)
        found = available()
        if as_json:
            rows = {
                n: {"numerics": c.numerics, "step": c.step, "default": c.default, "summary": c.summary()}
                for n, c in found.items()
            }
            _say(json.dumps(rows, indent=2))
            return
        for name, cls in found.items():
            mark = "*" if cls.default else " "
            _say(f"{mark} {name:<26}{cls.numerics:<16}{cls.summary()}")


@app.command()
def diff(
    model: Model, pass_: Passes = None, inputs: Inputs = None, load: Load = None, train: Train = False,
    raw: Annotated[bool, typer.Option(help="compare with the graph before canonicalization")] = False,
    html: Annotated[
        Path | None, typer.Option(help="write a page with sites, proofs and both graphs to this file")
    ] = None,
    measure: Measure = False, allow: Allow = "reassociated", as_json: AsJson = False, debug: Debug = False,
) -> None:  # fmt: skip
    """What the passes change: exit code 0 nothing, 1 something."""
    with _reported(debug):
        if html is not None and as_json:
            raise OptionError("--html and --json are two forms of one answer", "leave one of them out")
        fast = _accelerated(model, pass_, inputs, load, train, allow, measure)
        if html is not None:
            found = _written(fast.report(), html, raw)
            raise typer.Exit(1 if found else 0)
        found = fast.diff(raw=raw)
        if as_json:
            _say(found.to_json())
        else:
            for line in str(found).splitlines():
                _console.print(_coloured(line))
    raise typer.Exit(1 if found else 0)


@app.command()
def explain(
    model: Model, pass_: Passes = None, inputs: Inputs = None, load: Load = None, train: Train = False,
    why_not: Annotated[
        tuple[str, str] | None, typer.Option(help="one pass in one module: fuse-attention layers.3")
    ] = None,
    measure: Measure = False, allow: Allow = "reassociated", as_json: AsJson = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Every site that a pass looked at: applied, or which clause said no, at which of your lines."""
    with _reported(debug):
        _load(load)
        asked: Any = pass_
        if why_not is not None:
            (one,), given = resolve(why_not[:1]), resolve(pass_)
            asked = given if any(p.name == one.name for p in given) else [*given, one]
        fast = _accelerated(model, asked, inputs, None, train, allow, measure)
        report = fast.report()
        if why_not is not None:
            _within(fast, why_not[1])
            report = report.within(one.name, why_not[1])
        if as_json:
            _say(report.to_json())
            return
        for name in report:
            for line in _explained(report[name]):
                _say(line)
        for capture in report.captures:
            for note in capture.notes:
                _say(f"note: {note}")


@app.command()
def verify(
    model: Model, pass_: Passes = None, inputs: Inputs = None, load: Load = None, train: Train = False,
    steps: Annotated[int, typer.Option(help="also train both for so many steps; compare the losses")] = 0,
    against: Annotated[
        str | None, typer.Option(help="of a saved file: package.module:callable of the model as written")
    ] = None,
    allow: Allow = "reassociated", debug: Debug = False,
) -> None:  # fmt: skip
    """Run every proof again: exit code 0 all hold, 1 one failed."""
    with _reported(debug):
        saved = model.endswith(".fxa") or Path(model).is_file()
        if against is not None and not saved:
            raise OptionError("--against is of a saved file", f"the model as written is {model}")
        source = None if against is None else _model(against)[0]
        if saved:
            fast = fxaccel.load(model)
        else:
            fast = _accelerated(model, pass_, inputs, load, train or steps > 0, allow)
        with _progress(f"verifying {model}"):
            found = fast.verify(steps=steps, model=source)
        _say(str(found))
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def bisect(
    model: Model,
    check: Annotated[str, typer.Option(help="package.module:callable of a model; whether it does right")],
    pass_: Passes = None, inputs: Inputs = None, load: Load = None, train: Train = False,
    repro: Annotated[Path | None, typer.Option(help="write a script that runs the first site alone")] = None,
    allow: Allow = "reassociated", as_json: AsJson = False, debug: Debug = False,
) -> None:  # fmt: skip
    """Which rewrites make a check of yours fail: exit code 0 none, 1 those that are named."""
    with _reported(debug):
        made, example = _described(model, pass_, inputs, load, train)
        with _progress(f"bisecting {model}"):
            found = fxaccel.bisect(made, _imported(check), pass_, example_inputs=example, allow=allow)
        for line in [found.to_json()] if as_json else str(found).splitlines():
            _say(line)
        if repro is not None and found.suspects:
            repro.write_text(found.repro())
    raise typer.Exit(1 if found.suspects else 0)


@app.command()
def bench(
    model: Model, pass_: Passes = None, inputs: Inputs = None, load: Load = None, train: Train = False,
    rounds: Annotated[int, typer.Option(help="of which the least time counts")] = 15,
    allow: Allow = "reassociated", as_json: AsJson = False, debug: Debug = False,
) -> None:  # fmt: skip
    """What each pass buys on this machine: time of a call, or of a step of training, and its memory."""
    with _reported(debug):
        made, example = _described(model, pass_, inputs, load, train)
        with _progress(f"measuring {model}"):
            found = gains(made, pass_, Call(*call_of(example)), allow=allow, rounds=rounds)
        for line in [found.to_json()] if as_json else str(found).splitlines():
            _say(line)


@app.command()
def plan(
    model: Model, pass_: Passes = None, inputs: Inputs = None, load: Load = None,
    budget: Annotated[
        str | None, typer.Option(help="6GiB for the whole step, or 0.4 of its activations")
    ] = None,
    max_overhead: Annotated[
        float | None, typer.Option(help="in its place: the most to compute again, a share of the step's time")
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="whose state counts: none, sgd, momentum, adam, adamw")
    ] = "none",
    points: Annotated[int, typer.Option(help="budgets on the curve")] = 20,
    out: Annotated[Path | None, typer.Option(help="draw the curve: a file that ends in .svg or .png")] = None,
    stages: Annotated[
        int | None, typer.Option(help="in place of a budget: devices of a pipeline, for which it is cut")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="of a step of the pipeline; that of the example")] = None,
    memory: Annotated[str | None, typer.Option(help="of each of its devices: 6GiB, or 6GiB,4GiB")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="bytes a second between them: 10e9")] = None,
    latency: Annotated[float | None, typer.Option(help="seconds before the first byte is there")] = None,
    schedule: Annotated[str | None, typer.Option(help="by its name in torch; without it, chosen")] = None,
    microbatches: Annotated[int | None, typer.Option(help="of a batch; without it, chosen")] = None,
    timeline: Annotated[
        Path | None, typer.Option(help="draw a step of the pipeline: a file that ends in .svg, .png or .txt")
    ] = None,
    allow: Allow = "reassociated", as_json: AsJson = False, debug: Debug = False,
) -> None:  # fmt: skip
    """What a training step keeps and computes again within a budget of memory, before anything runs.

    With --stages: how it is cut for the devices of a pipeline, and which schedule runs it in the least time.
    """
    pipeline: dict[str, Any] = {
        "batch": batch, "memory": memory, "bandwidth": bandwidth, "latency": latency, "schedule": schedule,
        "microbatches": microbatches, "timeline": timeline,
    }  # fmt: skip
    with _reported(debug):
        if stages is None:
            _apart(pipeline, "of a pipeline", "say --stages")
            one, file, options = _checkpoint(budget, max_overhead, optimizer, points, out)
        else:
            curve = {"budget": budget, "max_overhead": max_overhead, "out": out}
            _apart(curve, "of a plan without --stages", "say --memory and --timeline")
            one, file, options = _partition(stages, optimizer, **pipeline)
        if any(isinstance(p, type(one)) for p in resolve(pass_)):
            hint = "say --budget" if stages is None else "say --stages"
            raise OptionError(f"--pass names {one.name!r}, which this command plans", hint)
        fast = _accelerated(model, pass_, inputs, load, True, allow, check=False)
        with _progress(f"planning {model}"):
            found = one.study(_whole(fast), **options)
        if file is not None:
            found.draw(file)
        for line in [found.to_json()] if as_json else found.lines():
            _say(line)


def _checkpoint(
    budget: str | None, max_overhead: float | None, optimizer: str, points: int, out: Path | None
) -> tuple[Any, Path | None, dict[str, Any]]:
    """The pass that plans a budget, the file to draw, and what there is to study."""
    cls: Any = available()["checkpoint"]
    one = cls(budget=budget, max_overhead=max_overhead, optimizer=optimizer)
    if out is not None:
        drawable(out)
    return one, out, {"points": points}


def _partition(
    stages: int, optimizer: str, *, memory: str | None, bandwidth: float | None, latency: float | None,
    schedule: str | None, timeline: Path | None, **asked: Any,
) -> tuple[Any, Path | None, dict[str, Any]]:  # fmt: skip
    """The same for a pipeline."""
    cls: Any = available()["partition"]
    told = None if memory is None else memory.replace(",", "|")
    one = cls(stages=stages, memory=told, bandwidth=bandwidth, optimizer=optimizer)
    if timeline is not None:
        check_drawable(timeline)
    name = None if schedule is None else named(schedule)
    return one, timeline, {"schedule": name, "latency": latency or 0.0, **asked}


def _apart(options: dict[str, Any], what: str, hint: str) -> None:
    """Raise OptionError where an option is given that says nothing here."""
    for name, value in options.items():
        if value is not None:
            raise OptionError(f"--{name.replace('_', '-')} is {what}", hint)


def _within(fast: Any, path: str) -> None:
    """Raise OptionError where the model has no such module."""
    modules = [name for name, _ in fast.named_modules() if name]
    if path not in modules:
        close = get_close_matches(path, modules, 1)
        raise OptionError(
            f"the model has no module {path!r}",
            f"did you mean {close[0]!r}?" if close else "name one by its path",
        )


def main() -> None:
    """Entry point of the console script."""
    app()


# -- models and inputs -----------------------------------------------------------------------------


def _accelerated(
    name: str, pass_: list[str] | None, inputs: list[str] | None, load: list[Path] | None, train: bool,
    allow: str, measure: bool = False, check: bool = True,
) -> Any:  # fmt: skip
    """The captured model that the command line describes."""
    model, example = _described(name, pass_, inputs, load, train)
    with _progress(f"capturing {name}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what applied nowhere is in the report
        return fxaccel.accelerate(
            model, pass_, example_inputs=example, allow=allow, measure=measure, check=check
        )


def _described(
    name: str, pass_: list[str] | None, inputs: list[str] | None, load: list[Path] | None, train: bool
) -> tuple[nn.Module, Any]:
    """The model of the command line, and its example inputs."""
    _load(load)
    resolve(pass_)  # a wrong option is said before the model is built
    model, example = _model(name)
    model.train(train)
    if inputs:
        example = _example(inputs)
    if example is None:
        raise OptionError(
            f"{name} gives a model without example inputs", '--input "input_ids=int64[2,128]" describes one'
        )
    return model, example


def _whole(fast: Any) -> Any:
    """The one program that an accelerated model is."""
    (captured,) = fast.__dict__["_fxaccel"].all
    program = getattr(captured, "program", None)
    if program is None:
        raise OptionError(f"the model was captured in pieces, which have no one step: {captured.report}")
    return program


def _imported(name: str) -> Any:
    """What `package.module:attribute` names."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not re.fullmatch(r"\w+(\.\w+)*:\w+(\.\w+)*", name):
        raise OptionError(f"{name!r} does not name a callable", "write package.module:callable")
    sys.path.insert(0, "")  # as `python -m` does: the model may lie in the present folder
    try:
        found: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"{name} cannot be imported: {error}", "name it package.module:callable") from error
    finally:
        sys.path.remove("")
    return found


def _model(name: str) -> tuple[nn.Module, Any]:
    build = _imported(name)
    made = build if isinstance(build, nn.Module) else build()
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise OptionError(
            f"{name} gives a {type(model).__name__}, expected an nn.Module or (model, example_inputs)"
        )
    return model, example


def _example(texts: list[str]) -> Any:
    """Random inputs from `name=dtype[sizes]` (keyword) or `dtype[sizes]` (positional)."""
    args: list[torch.Tensor] = []
    kwargs: dict[str, torch.Tensor] = {}
    for text in texts:
        form = re.fullmatch(r"\s*(?:(\w+)\s*=\s*)?(\w+)\[([\d,\s]*)\]\s*", text)
        dtype = getattr(torch, form[2], None) if form else None
        if form is None or not isinstance(dtype, torch.dtype):
            raise OptionError(f"--input {text!r} is not an input", "write name=dtype[sizes]: x=float32[2,3]")
        sizes = [int(s) for s in form[3].split(",") if s.strip()]
        generator = torch.Generator().manual_seed(len(args) + len(kwargs))
        if dtype.is_floating_point:
            value = torch.randn(sizes, generator=generator).to(dtype)
        else:
            value = torch.randint(0, 2, sizes, generator=generator).to(dtype)
        if form[1]:
            kwargs[form[1]] = value
        else:
            args.append(value)
    if args and kwargs:
        raise OptionError("--input mixes positional and named inputs", "name all of them or none")
    return kwargs or tuple(args)


def _load(files: list[Path] | None) -> None:
    for file in files or ():
        spec = importlib.util.spec_from_file_location(file.stem, file)
        if spec is None or spec.loader is None or not file.is_file():
            raise OptionError(f"--load {file}: there is no such Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module  # dataclasses and pickle look their module up by name
        spec.loader.exec_module(module)


# -- output ----------------------------------------------------------------------------------------


def _say(text: str) -> None:
    _console.print(Text(text))


@contextlib.contextmanager
def _progress(text: str) -> Iterator[None]:
    """A spinner on a terminal, nothing in a pipe."""
    with _errors.status(text) if _errors.is_terminal else contextlib.nullcontext():
        yield


def _coloured(line: str) -> Text:
    style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "")
    return Text(line, style=style)


def _written(report: Report, file: Path, raw: bool) -> bool:
    """Write the page of a report; whether anything differs in any of its graphs."""
    try:
        file.write_text(report.html(raw=raw), encoding="utf-8")
    except OSError as error:
        raise OptionError(f"--html {file} cannot be written: {error.strerror}") from None
    _say(f"{file}: {file.stat().st_size / 2**10:.0f} KiB")
    graphs = report.about.graphs if report.about else ()
    return any(g.diff(raw) for group in graphs for g in group)


def _explained(report: PassReport) -> Iterator[str]:
    yield f"{report.name}: {len(report.applied)} applied, {len(report.refused)} refused"
    if report.error:
        yield f"  changed nothing: {report.error}"
    words: list[tuple[str, list[Site], Callable[[Site], str]]] = [
        ("applied", report.applied, lambda s: "  ".join(filter(None, (s.rule, s.why)))),
        ("refused", report.refused, lambda s: s.why),
        ("near miss", report.near_misses, lambda s: s.why),
    ]
    for word, sites, why in words:
        for site in sites:
            yield f"  {word:<10}{site.path or '(root)'}  {site.source}  {why(site)}"
            if site.change:
                yield f"            it would be taken with: {site.change}"


@contextlib.contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """One line and a hint for the user's mistakes; a traceback with --debug."""
    try:
        yield
    except FxaccelError as error:
        if debug:
            traceback.print_exc()
        _errors.print(Text(f"error: {error}"))
        raise typer.Exit(2) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:  # the model's own, of inputs that it does not take say
        if debug:
            traceback.print_exc()
        _errors.print(Text(f"error: {type(error).__name__}: {error}\nhint: --debug shows where"))
        raise typer.Exit(2) from None
