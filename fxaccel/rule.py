"""What a pass is: rules, whole-graph passes, and how they are registered.

A Rule is one sentence: "this becomes that, unless ...". It has three methods, in this order:

    pattern(self, op, x, ...)   the ATen code it replaces, in the canonical form of fxaccel.canonical
    refuse(self, m)             yields sentences that say why this site is left alone
    rewrite(self, op, m)        the code that takes its place

The driver does the rest: it finds the sites, proves every one (fxaccel.proof), keeps names and
provenance, and records what was applied, refused, or nearly matched. A Pass that needs the whole graph
has `plan(program)`, which decides and edits nothing, and `apply(program, plan)`, which edits and decides
nothing. Options of either are its dataclass fields.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from torch import Tensor, fx

from fxaccel.errors import OptionError, RuleError
from fxaccel.ir import Program, Replacement, path
from fxaccel.pattern import ANY, Match, Miss, Ops, Pattern
from fxaccel.picture import Picture
from fxaccel.quality import Budget

__all__ = [
    "ANY", "Finder", "Match", "Miss", "Ops", "Pass", "Refusal", "Refusals", "Rule", "Rules", "joined",
    "register",
]  # fmt: skip

Refusals = Iterator[str]


class Refusal(str):
    """A sentence of `refuse` that also says what of the user's would have to be another way."""

    __slots__ = ("change",)
    change: str

    def __new__(cls, why: str, change: str) -> Refusal:
        """`why` it is left alone, and what `change` of model, call or options would let it be taken."""
        made = super().__new__(cls, why)
        made.change = change
        return made


def joined(sentences: Iterable[str]) -> str:
    """Sentences as one, with what would change it where each of them knows."""
    said = list(sentences)
    changes = [w.change for w in said if isinstance(w, Refusal)]
    why = "; ".join(said)
    return Refusal(why, "; ".join(dict.fromkeys(changes))) if said and len(changes) == len(said) else why


Numerics = Literal["bitwise", "reassociated", "lower_precision", "approximate"]
NUMERICS: tuple[Numerics, ...] = ("bitwise", "reassociated", "lower_precision", "approximate")
EXACT = NUMERICS[:2]  # the same function, up to the order of summation
STEPS = ("raise", "rewrite", "plan", "lower", "cut", "schedule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """A named change of the whole graph.

    name         as users type it, "fuse-norm"
    step         when it runs: one of STEPS
    numerics     the loosest difference it may make: one of NUMERICS
    serves       the modes it is for
    requires     properties of the graph it needs; produces, invalidates: those it makes and breaks
    conflicts    names of passes that cannot run in the same pipeline
    default      whether `accelerate(model)` runs it without being asked
    at_most      times as long as the original a site may take where it is timed: more than 1 for memory saved
    together     whether the whole graph is timed and not each site: for what one site leaves to the next
    where        option of every pass: glob of module paths it is limited to, several joined by "|"
    """

    name: ClassVar[str] = ""
    step: ClassVar[str] = "rewrite"
    numerics: ClassVar[Numerics] = "reassociated"
    serves: ClassVar[tuple[str, ...]] = ("training", "inference")
    requires: ClassVar[tuple[str, ...]] = ()
    produces: ClassVar[tuple[str, ...]] = ()
    invalidates: ClassVar[tuple[str, ...]] = ()
    conflicts: ClassVar[tuple[str, ...]] = ()
    default: ClassVar[bool] = False
    at_most: ClassVar[float] = 1.0
    together: ClassVar[bool] = False

    where: str = "*"

    def plan(self, program: Program) -> Any:
        """Decide, as a frozen printable dataclass; edit nothing."""
        return None

    def apply(self, program: Program, plan: Any, driver: Any) -> None:
        """Edit the graph as planned, recording sites with `driver.applied` and `driver.refused`."""
        raise RuleError(f"pass {self.name!r} has no apply method")

    def limit(self) -> Budget | None:
        """How much a pass that is not exact may change: its option `budget`, None for no limit."""
        budget = getattr(self, "budget", None)
        return None if budget is None else Budget.of(budget)

    @classmethod
    def opened(cls, name: str, tensor: Tensor, aliases: tuple[str, ...]) -> Replacement | None:
        """Parameters in the place of one that another library holds in a tensor of its own kind.

        name, aliases    of the parameter, which may be tied

        None for kinds that the pass does not know. In captures the pass finds it in `program.adopted`.
        """
        return None

    def pictures(self, program: Program) -> Iterator[Picture]:
        """What there is to see of what the pass made of a program, for the page of `report.html()`."""
        return iter(())

    def covers(self, node: fx.Node) -> bool:
        """Whether the node lies in the modules that `where` names."""
        return any(fnmatch.fnmatchcase(path(node), glob) for glob in self.where.split("|"))

    @classmethod
    def summary(cls) -> str:
        """First line of the docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    def __str__(self) -> str:
        """As it is typed: `quantize{weights=int8}`."""
        changed = [
            f"{f.name}={getattr(self, f.name)}"
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        ]
        return self.name + (f"{{{','.join(changed)}}}" if changed else "")


class Rules(Pass):
    """A pass made of local rules, tried in order until none fires: `rules` names their classes."""

    rules: ClassVar[tuple[type[Rule], ...]] = ()

    def apply(self, program: Program, plan: Any, driver: Any) -> None:
        """Rewrite every site of every rule."""
        driver.rewrite([r() for r in self.rules])


class Search(Protocol):
    """Finds a rule's sites: at nodes that call one of `targets`."""

    @property
    def targets(self) -> frozenset[Any]:
        """Operators that a site's root can call."""

    def find(self, program: Program, root: fx.Node) -> Match | Miss:
        """The site at `root`, or how far it came."""


@dataclasses.dataclass(frozen=True)
class Finder:
    """A Search made of the operators that its sites call and of a function of the program and a node."""

    targets: frozenset[Any]
    find: Callable[[Program, fx.Node], Match | Miss]


class Rule(Rules):
    """A local rewrite: `pattern` becomes `rewrite` unless `refuse` yields a sentence.

    redraws      whether it may take random operators in, and draw other numbers of the same distribution; the
                 same numbers, where its numerics are "bitwise"
    """

    redraws: ClassVar[bool] = False

    def apply(self, program: Program, plan: Any, driver: Any) -> None:
        """Rewrite every site of this rule."""
        driver.rewrite([self])

    def pattern(self, op: Ops, *values: Any) -> Any:
        """The code this replaces; returns, root first, every value that others may read."""
        raise RuleError(f"rule {type(self).__name__} has no pattern method")

    def refuse(self, m: Match) -> Refusals:
        """Why this site is left alone, in sentences with the numbers that decided."""
        return iter(())

    def rewrite(self, op: Ops, m: Match) -> Any:
        """The code that takes the place of the pattern, returning as many values."""
        raise RuleError(f"rule {type(self).__name__} has no rewrite method")

    def any_size(self, m: Match) -> int | None:
        """A fixed size of the site that could as well be another: a large one is proved at a smaller."""
        return None

    def remark(self, m: Match) -> str:
        """What the report says of a rewritten site besides the names."""
        return ""

    def traced(self) -> Search:
        """What finds the sites: the pattern as a term, unless the rule has a search of its own."""
        return Pattern.trace(self.pattern)


# -- the registry ----------------------------------------------------------------------------------

_registry: dict[str, type[Pass]] = {}
P = TypeVar("P", bound=Pass)


def declared(cls: type[Pass]) -> None:
    """Raise RuleError where a pass has no name, or is of no step or class."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", cls.name):
        raise RuleError(f"{cls.__name__}.name is {cls.name!r}, expected words joined by hyphens")
    if cls.numerics not in NUMERICS or cls.step not in STEPS:
        raise RuleError(
            f"{cls.__name__} has numerics {cls.numerics!r} and step {cls.step!r}, "
            f"expected one of {NUMERICS} and of {STEPS}"
        )


def register(cls: type[P]) -> type[P]:
    """Class decorator: make a pass known by its name, with its annotated fields as options."""
    declared(cls)
    known = _registry.get(cls.name)
    if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
        raise OptionError(
            f"two passes are named {cls.name!r}: {known.__module__}.{known.__qualname__} and "
            f"{cls.__module__}.{cls.__qualname__}",
            "give yours another name",
        )
    made = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    _registry[cls.name] = made
    return made


def registered() -> dict[str, type[Pass]]:
    """Every pass that a decorator has made known so far, by name."""
    return dict(_registry)
