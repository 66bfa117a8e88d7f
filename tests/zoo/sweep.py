"""Export every model of the zoo, in eval and in train mode, and compare with eager.

    python -m tests.zoo.sweep OUT.json [NAME ...] [--static] [--strict] [--no-cache] [--no-labels]
                              [--modes eval,train]

One line an entry and mode: parameters, seconds in eager, seconds in export, and `ok` or the first
line of the error with the frame of the model's code. Dims of size 2 and up are dynamic. Both sides
start from equal weights, buffers and random seed; a difference means that the export computes
something else. OUT.json gets the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import random
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo import timm_zoo, transformers_zoo
from tests.zoo.entry import Entry

NOT_THE_MODEL = (
    "/torch/",
    "<eval_with_key>",
    "tests/zoo/",
    "contextlib.py",
    "functools.py",
    "<string>",
)
WRAPPERS = ("utils/generic.py", "utils/output_capturing.py", "modeling_layers.py")


@dataclasses.dataclass
class Row:
    """What happened to one entry in one mode; `error` is a difference, or the first line raised."""

    name: str
    family: str
    mode: str
    params: int = 0
    eager_s: float = 0.0
    export_s: float = 0.0
    ok: bool = False
    error: str = ""
    where: str = ""
    nodes: int = 0
    specialised: str = ""
    opaque: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--modes", default="eval,train")
    for flag in ("static", "strict", "no-cache", "no-labels"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_intermixed_args()
    quieten()
    rows: list[Row] = []
    entries = transformers_zoo.entries() + timm_zoo.entries()
    for entry in entries:
        if options.names and entry.name not in options.names:
            continue
        for mode in options.modes.split(","):
            row = sweep(entry, mode, options)
            rows.append(row)
            sys.stdout.write(line(row) + "\n")
            sys.stdout.flush()
            gc.collect()
        with open(options.out, "w") as file:
            json.dump([dataclasses.asdict(row) for row in rows], file, indent=1)
    sys.stdout.write(f"{sum(row.ok for row in rows)} of {len(rows)} ok\n")


def quieten() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)


def line(row: Row) -> str:
    status = "ok" if row.ok else f"{row.error}  @ {row.where}"
    notes = f"{row.specialised} {row.opaque}".strip()
    return (
        f"{row.name:26} {row.mode:5} {row.params:>9} {row.eager_s:7.3f} {row.export_s:7.2f}"
        f"  {status}  {notes}"
    )


def sweep(entry: Entry, mode: str, options: argparse.Namespace) -> Row:
    """Run one entry; whatever it raises becomes the row's error."""
    row = Row(entry.name, entry.family, mode)
    try:
        compare(row, entry, options)
    except Exception as error:
        row.error, row.where = first_line(error), model_frame(error)
    return row


def compare(row: Row, entry: Entry, options: argparse.Namespace) -> None:
    """Fill the row: eager on one copy of the model, export on another."""
    eager, model = prepare(entry, row.mode, options), prepare(entry, row.mode, options)
    inputs = given(entry, options)
    row.params = sum(p.numel() for p in eager.parameters())
    seed()
    start = time.perf_counter()
    want = eager(**given(entry, options))
    row.eager_s = time.perf_counter() - start
    row.opaque = ", ".join(sorted({type(leaf).__name__ for leaf in foreign(want)}))

    dynamic = None if options.static else tree_shapes(inputs)
    seed()
    start = time.perf_counter()
    try:
        program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic, strict=options.strict)
    finally:
        row.export_s = time.perf_counter() - start
    row.nodes = len(program.graph.nodes)
    row.specialised = specialised(program, inputs)
    exported = program.module()
    seed()
    got = exported(**given(entry, options))
    row.error = differences(want, got) or differences(buffers(eager), buffers(model))
    row.ok = not row.error


def prepare(entry: Entry, mode: str, options: argparse.Namespace) -> nn.Module:
    model = entry.build().train(mode == "train")
    for module in model.modules():
        if options.no_cache and hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False
    return model


def given(entry: Entry, options: argparse.Namespace) -> dict[str, Any]:
    inputs = entry.inputs()
    if options.no_labels:
        inputs.pop("labels", None)
    return inputs


def seed() -> None:
    """The same random numbers on both sides; models also draw from numpy's and Python's."""
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


def tree_shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """Every dim of size 2 and up dynamic: export takes sizes 0 and 1 for constants."""
    auto = torch.export.Dim.AUTO

    def dims(leaf: Any) -> dict[int, Any] | None:
        if not isinstance(leaf, Tensor):
            return None
        return {dim: auto for dim, size in enumerate(leaf.shape) if size >= 2}

    return pytree.tree_map(dims, inputs)


def specialised(program: torch.export.ExportedProgram, inputs: dict[str, Any]) -> str:
    """The dims asked to be dynamic that export fixed: "input_ids: 1" and so on."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    fixed = []
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name in nodes:
            sizes = nodes[name].meta["val"].shape
            dims = [str(i) for i, size in enumerate(sizes) if (constant(size) or 0) >= 2]
            fixed += [f"{name}[{','.join(dims)}]"] if dims else []
    return "fixed: " + " ".join(fixed) if fixed else ""


def constant(size: int | torch.SymInt) -> int | None:
    """The value of a size that is fixed; export keeps even those as symbols of one value."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def foreign(output: Any) -> Iterator[Any]:
    """Leaves of the output that are neither tensors nor plain values: objects no pytree opens."""
    for leaf in pytree.tree_leaves(output):
        if leaf is not None and not isinstance(leaf, (Tensor, bool, int, float, str)):
            yield leaf


def tensors(value: Any, path: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Every tensor within the value, with its path; looks into objects no pytree opens."""
    for key, leaf in pytree.tree_leaves_with_path(value):
        at = path + pytree.keystr(key)
        if isinstance(leaf, Tensor):
            yield at, leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type) and depth < 4:
            yield from tensors(vars(leaf), at, depth + 1)


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers())


def differences(want: Any, got: Any) -> str:
    """Where two outputs differ in structure, type or value; nothing if they agree."""
    if type(want) is not type(got):
        return f"output is a {type(got).__name__}, eager's a {type(want).__name__}"
    left, right = dict(tensors(want)), dict(tensors(got))
    if left.keys() != right.keys():
        return f"output keys differ: {sorted(left.keys() ^ right.keys())[:6]}"
    for path, tensor in left.items():
        other = right[path]
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            return f"{path} is {other.dtype}{list(other.shape)}, eager's {tensor.dtype}{list(tensor.shape)}"
        if not torch.allclose(tensor, other, rtol=1e-4, atol=1e-5, equal_nan=True):
            return f"{path} differs by {(tensor - other).abs().max().item():.3g}"
    return ""


def first_line(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {text}"[:240]


def model_frame(error: BaseException) -> str:
    """The innermost frame of the model's own code, through the errors that caused this one."""
    found = ""
    current: BaseException | None = error
    while current is not None:
        for frame in traceback.extract_tb(current.__traceback__):
            if not any(part in frame.filename for part in NOT_THE_MODEL + WRAPPERS):
                name = frame.filename.split("site-packages/")[-1]
                found = f"{name}:{frame.lineno}: {frame.line}"
        current = current.__cause__ or current.__context__
    return found


if __name__ == "__main__":
    sys.exit(main())
