"""Random models, each a short program: the text of a failing one can be pasted and run.

`written(seed)` draws statements of `tests.random_statements` over a pool of values. Each is run as it is
written, so what torch itself refuses never comes into a model. The text names the dtypes it computes in, so
that the same program can be run in float64 alone.
"""

from __future__ import annotations

import itertools
import linecache
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DTYPES = "HALF, WIDE = torch.bfloat16, torch.float32"
EXACT_DTYPES = "HALF, WIDE = torch.float64, torch.float64"
BATCH = 7  # while a model is written: no other size is, so that a program never has it for a number
LARGEST = 50.0  # beyond which a value is not taken
TEXT = """\
import torch
import torch.nn.functional as F
from torch import nn

{dtypes}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
{setup}

    def forward(self, {arguments}):
{body}
        return {results}


def inputs(batch):
    return {inputs},
"""

Predicate = Callable[[Tensor], bool]


class Refused(Exception):
    """A statement that a model cannot have here."""


@dataclass(frozen=True)
class Sample:
    """A model as text, and how it is to be run."""

    seed: Any
    text: str
    train: bool
    grad: bool
    batches: tuple[int, int]
    families: tuple[str, ...]

    def module(self, exact: bool = False) -> nn.Module:
        """The model with its own weights, whatever was drawn before; `exact`: to be run in float64."""
        torch.manual_seed(1)
        model = self._names(exact)["Model"]()
        for p in model.parameters():  # norms that are not the identity
            p.data.add_(0.1 * torch.randn_like(p))
        return model.train(self.train)

    def inputs(self, batch: int) -> tuple[Any, ...]:
        torch.manual_seed(batch)
        made = self._names()["inputs"](batch)
        if not self.grad:
            return made
        return tuple(t.requires_grad_() if i == 0 and t.is_leaf else t for i, t in enumerate(made))

    def _names(self, exact: bool = False) -> dict[str, Any]:
        text = self.text.replace(DTYPES, EXACT_DTYPES) if exact else self.text
        name = f"<random model {self.seed}{' in float64' if exact else ''}>"
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        names: dict[str, Any] = {}
        exec(compile(text, name, "exec"), names)
        return names

    def __str__(self) -> str:
        mode = f"{'train' if self.train else 'eval'}, {'grad' if self.grad else 'no_grad'}"
        return f"# seed {self.seed}: {mode}, batches of {self.batches}\n{self.text}"


class Writer:
    """Writes one model; a family of statements calls `pick`, `layer`, `let` and `run`."""

    def __init__(self, seed: Any) -> None:
        self.draw = random.Random(str(seed))
        self.setup: list[str] = []
        self.body: list[str] = []
        self.live: dict[str, Any] = {}
        self.pool: list[str] = []
        self.read: set[str] = set()
        self.given: dict[str, str] = {}
        self.self = nn.Module()
        self.numbers = itertools.count()
        self.train, self.grad = self.draw.choices(
            [(True, True), (False, False), (False, True), (True, False)], [10, 8, 2, 1]
        )[0]
        self.self.train(self.train)

    # -- what statements are made of --------------------------------------------------------------

    def chance(self, share: float) -> bool:
        return self.draw.random() < share

    def one(self, *choices: Any) -> Any:
        return self.draw.choice(choices)

    def name(self, stem: str) -> str:
        return f"{stem}{next(self.numbers)}"

    def pick(self, fits: Predicate = torch.is_floating_point, other: str = "") -> str:
        """A value of the pool, mostly a late one."""
        names = [n for n in self.pool if fits(self.live[n]) and n != other]
        if not names:
            raise Refused("no value fits")
        at = int(self.draw.random() ** 2 * len(names))
        self.read.add(names[-1 - at])
        return names[-1 - at]

    def like(self, name: str) -> str:
        """Another value of the same shape and dtype, or the same."""
        t = self.live[name]
        try:
            return self.pick(lambda o: o.shape == t.shape and o.dtype == t.dtype, name)
        except Refused:
            return name

    def __getitem__(self, name: str) -> Tensor:
        return self.live[name]

    def size(self, name: str, dim: int) -> str:
        """A size as it is written in the program."""
        n = self.live[name].shape[dim]
        return f"{name}.shape[{dim}]" if n % BATCH == 0 or self.chance(0.3) else str(n)

    def layer(self, text: str, stem: str = "l") -> str:
        """A new attribute of the module."""
        name = f"self.{self.name(stem)}"
        self.declare(f"{name} = {text}")
        return name

    def declare(self, line: str) -> None:
        exec(line, {"torch": torch, "nn": nn, "self": self.self})
        self.setup.append(line)

    def buffer(self, text: str) -> str:
        name = self.name("b")
        self.declare(f'self.register_buffer("{name}", {text})')
        return f"self.{name}"

    def run(self, line: str) -> None:
        """A statement, run as it is written."""
        names = {"torch": torch, "F": F, "self": self.self, "HALF": torch.bfloat16, "WIDE": torch.float32}
        with torch.set_grad_enabled(self.grad):
            exec(line, {**names, **self.live}, self.live)
        self.body += line.splitlines()

    def let(self, text: str, keep: bool = True) -> str:
        """A new value, which other statements may read if it is kept."""
        name = self.name("v")
        self.run(f"{name} = {text}")
        self.see(name, keep)
        return name

    def see(self, name: str, keep: bool = True) -> None:
        """Take a value into the pool."""
        t = self.live[name]
        if not isinstance(t, Tensor) or t.numel() > 2**16 or t.dim() > 5:
            raise Refused("too large")
        if t.is_floating_point() and not (t.isfinite().all() and t.abs().max() < LARGEST):
            raise Refused("it overflows")
        if keep:
            self.pool.append(name)

    def input(self, stem: str, text: str) -> str:
        """A new argument of the model."""
        name = stem if stem not in self.given else self.name(stem)
        self.live[name] = eval(text, {"torch": torch, "batch": BATCH})
        self.given[name] = text
        self.pool.append(name)
        return name

    def attempt(self, family: Callable[[Writer], None]) -> bool:
        """Write a family's statements, or none of them where torch refuses one."""
        before = len(self.setup), len(self.body), len(self.pool)
        names = dict(self.live), set(self.read), dict(self.given)
        try:
            family(self)
        except (Refused, RuntimeError, IndexError, ValueError, TypeError, AttributeError):
            del self.setup[before[0] :], self.body[before[1] :], self.pool[before[2] :]
            self.live, self.read, self.given = names
            return False
        return True

    def results(self) -> str:
        """All that is not read by others, so that nothing is dead, and some that is."""
        made = [n for n in self.pool if n not in self.given]
        told = [n for n in made if n not in self.read or self.chance(0.15)]
        if len(told) == 1 and self.chance(0.5):
            return told[0]
        if self.chance(0.2):
            return "{" + ", ".join(f'"{n}": {n}' for n in told) + "}"
        return "(" + ", ".join(told) + ",)"

    def text(self) -> str:
        def indented(lines: list[str]) -> str:
            return "\n".join(f"        {line}" for line in lines or ["pass"])

        code, setup = "\n".join(self.body), list[str]()
        for line in reversed(self.setup):  # a layer that no statement calls is left out
            name = re.search(r"self\.register_buffer\(\"(\w+)|self\.(\w+)", line)
            if name and re.search(rf"self\.{name[1] or name[2]}\b", "\n".join([code, *setup])):
                setup.insert(0, line)
        return TEXT.format(
            dtypes=DTYPES, setup=indented(setup), body=indented(self.body), results=self.results(),
            arguments=", ".join(self.given), inputs=", ".join(self.given.values()),
        )  # fmt: skip


def strided(w: Writer, shape: tuple[Any, ...], make: str = "torch.randn") -> str:
    """The text of a tensor [batch, ...] of this shape, contiguous or not."""
    *most, last = shape
    sizes = ", ".join(map(str, shape))
    kinds = {
        f"{make}({sizes})": 8,
        f"{make}({', '.join(map(str, (*most, 2 * last)))})[..., ::2]": 1,
        f"{make}({', '.join(map(str, (*most, last + 3)))})[..., 1:{1 + last}]": 1,
        f"{make}(1, {', '.join(map(str, shape[1:]))}).expand(batch, *[-1] * {len(shape) - 1})": 1,
    }
    if len(shape) > 2:
        turned = ", ".join(map(str, (*shape[:-2], shape[-1], shape[-2])))
        kinds[f"{make}({turned}).transpose(-1, -2)"] = 2
    return w.draw.choices(list(kinds), list(kinds.values()))[0]


def written(seed: int, least: int = 3, most: int = 5) -> Sample:
    """The model of this seed: the first of its attempts that runs at two sizes of the batch.

    The first of its families goes round, so that no family is missing in as many models as there are.
    """
    from tests.random_statements import FAMILIES

    for attempt in itertools.count():
        w = Writer(f"{seed}.{attempt}")
        sequence, width = w.one(1, 4, 5, 6, 8, 8), w.one(4, 8, 8, 8, 16)
        w.input("x", strided(w, ("batch", sequence, width)))
        if w.chance(0.5):
            w.input("y", strided(w, ("batch", sequence, width)))
        families, count, first = [], w.draw.randint(least, most), list(FAMILIES)[seed % len(FAMILIES)]
        for family in [first, first, *w.draw.choices(list(FAMILIES), list(FAMILIES.values()), k=100)]:
            if len(families) < count and family not in families[:1] and w.attempt(family):
                families.append(family)
        batches = tuple(w.draw.sample((1, 2, 3, 4, 5, 8), 2))
        sample = Sample(seed, w.text(), w.train, w.grad, batches, tuple(f.__name__ for f in families))
        if runs(sample):
            return sample
    raise AssertionError


def runs(sample: Sample) -> bool:
    """Whether torch runs it, at both sizes of the batch, with finite results."""
    try:
        for batch in sample.batches:
            with torch.set_grad_enabled(sample.grad):
                model = sample.module()
                leaves = pytree.tree_leaves(model(*sample.inputs(batch)))
                flowing = [t.sum() for t in leaves if t.requires_grad]
                if flowing:
                    torch.stack([t.double() for t in flowing]).sum().backward()
            if not all(t.isfinite().all() for t in leaves if t.is_floating_point()):
                return False
    except (RuntimeError, IndexError, ValueError, TypeError):
        return False
    return True
