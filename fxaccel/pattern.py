"""Patterns over ATen graphs, and the match of one pattern at one node.

A pattern is the code it replaces, written with `op.aten.<name>.<overload>(...)`. A parameter of the
pattern matches any value; a literal matches itself; an argument that is not written matches the schema's
default and nothing else. Alternatives of one idea are joined by `op.either(tag=..., other=...)`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import fx

from fxaccel.errors import RuleError
from fxaccel.ir import Program, arguments, expr, is_call, target_name, value_of

aten = torch.ops.aten
_COMMUTE = {
    aten.add.Tensor, aten.mul.Tensor, aten.maximum.default, aten.minimum.default, aten.eq.Tensor,
    aten.ne.Tensor, aten.logical_and.default, aten.logical_or.default, aten.bitwise_and.Tensor,
    aten.bitwise_or.Tensor,
}  # fmt: skip


WAYS = 8  # of matching one pattern at one node, that are looked at


class _Any:
    def __repr__(self) -> str:
        return "ANY"


ANY = _Any()
"""Matches every value of an argument, and binds nothing."""


@dataclass(frozen=True, eq=False)
class Var:
    """A free value of the pattern: a parameter of `pattern`."""

    name: str


@dataclass(frozen=True, eq=False)
class Term:
    """A call of an operator in a pattern; `args` holds every schema argument by name."""

    target: torch._ops.OpOverload
    args: dict[str, Any]

    def __iter__(self) -> Iterator[Result]:
        return (Result(self, i) for i in range(len(self.target._schema.returns)))

    def __getitem__(self, index: int) -> Result:
        return Result(self, index)


@dataclass(frozen=True, eq=False)
class Result:
    """One of the results of a multi-output operator or of an operator that returns a list."""

    term: Term
    index: int


@dataclass(frozen=True, eq=False)
class Either:
    """Alternatives, tried in order, each with its tag."""

    options: tuple[tuple[str, Any], ...]


class Ops:
    """`op.aten.add.Tensor(...)`: looks up a real operator and hands the call to `make`."""

    def __init__(self, make: Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self._make = make

    def __getattr__(self, namespace: str) -> _Packets:
        return _Packets(getattr(torch.ops, namespace), self._make)

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Call any operator given as an object: `op(torch.ops.aten.relu.default, x)`."""
        return self._make(target, args, kwargs)

    @staticmethod
    def either(**options: Any) -> Either:
        """Alternatives of one idea; `m.chose("tag")` tells which one matched."""
        return Either(tuple(options.items()))


class _Packets:
    def __init__(self, namespace: Any, make: Any) -> None:
        self._namespace, self._make = namespace, make

    def __getattr__(self, name: str) -> _Overloads:
        return _Overloads(getattr(self._namespace, name), self._make)


class _Overloads:
    def __init__(self, packet: Any, make: Any) -> None:
        self._packet, self._make = packet, make

    def __getattr__(self, name: str) -> Callable[..., Any]:
        target = getattr(self._packet, name)
        return lambda *args, **kwargs: self._make(target, args, kwargs)


@dataclass(frozen=True)
class Pattern:
    """A traced pattern: its root, the other values it returns, and its free variables."""

    root: Any
    outputs: tuple[Any, ...]
    variables: tuple[str, ...]
    targets: frozenset[Any]

    @classmethod
    def trace(cls, function: Callable[..., Any]) -> Pattern:
        """Run a rule's `pattern` method on variables."""
        names = list(inspect.signature(function).parameters)[1:]
        returned = function(Ops(_term), *(Var(n) for n in names))
        outputs = returned if isinstance(returned, tuple) else (returned,)
        return cls(outputs[0], outputs, tuple(names), frozenset(_targets(outputs[0])))

    def find(self, program: Program, root: fx.Node) -> Match | Miss:
        """The pattern at `root`, or how far it came.

        Of several ways to match (`a + b` is `b + a`) it is the first whose inner values nobody else reads.
        """
        matcher, first = _Matcher(), None
        for match in islice(matcher.match(self.root, root, Match(program, root)), WAYS):
            absent = [v for v in self.variables if v not in match.bound]
            bound = match.bound | dict.fromkeys(absent)
            outputs = tuple(next(_made(t, match)) for t in self.outputs)
            found = replace(match, bound=bound, outputs=outputs)
            if all(found.nodes.issuperset(n.users) for n in found.nodes.difference(outputs)):
                return found
            first = first or found
        return first or matcher.miss


def _term(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Term:
    bound = {}
    for i, arg in enumerate(target._schema.arguments):
        positional = i < len(args) and not arg.kwarg_only
        bound[arg.name] = args[i] if positional else kwargs.get(arg.name, arg.default_value)
    unknown = set(kwargs) - set(bound)
    if unknown:
        raise RuleError(f"{target} has no argument {sorted(unknown)[0]!r}; it has {sorted(bound)}")
    return Term(target, bound)


def _targets(term: Any) -> Iterator[Any]:
    if isinstance(term, Either):
        for _, option in term.options:
            yield from _targets(option)
    elif isinstance(term, Result):
        yield operator.getitem
    elif isinstance(term, Term):
        yield term.target
    else:
        raise RuleError(f"a pattern must return operator calls, root first; got {term!r}")


@dataclass(frozen=True)
class Match:
    """A pattern found at `root`: its values by the names of the pattern's parameters.

    `m.x` is the node or literal bound to `x`; `m.val("x")` its fake tensor. `also` holds nodes that the
    rule has read the meaning of (a mask's comparisons, say): the proof runs them with the site, others may
    read them too.
    """

    program: Program
    root: fx.Node
    bound: dict[str, Any] = field(default_factory=dict)
    terms: dict[Any, fx.Node] = field(default_factory=dict)
    tags: frozenset[str] = frozenset()
    outputs: tuple[fx.Node, ...] = ()
    also: frozenset[fx.Node] = frozenset()

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["bound"][name]
        except KeyError:
            raise AttributeError(f"the pattern has no parameter {name!r}") from None

    @property
    def nodes(self) -> set[fx.Node]:
        return set(self.terms.values())

    def val(self, *names: str) -> Any:
        """Fake tensors (or literals) of pattern parameters; one alone or a tuple."""
        found = tuple(value_of(self.bound[n]) for n in names)
        return found[0] if len(names) == 1 else found

    def chose(self, tag: str) -> bool:
        """Whether the alternative with this tag matched."""
        return tag in self.tags

    def facts(self, analysis: Callable[[Program], Any]) -> Any:
        """The result of a whole-graph analysis."""
        return self.program.facts(analysis)

    def shapes(self, **layouts: str) -> Iterator[str]:
        """Refusals where values do not have the shapes given in letters: `q="B H S D"`."""
        sizes: dict[str, tuple[Any, str]] = {}
        for name, layout in layouts.items():
            shape, letters = self.val(name).shape, layout.split()
            if len(shape) != len(letters):
                yield f"{name} has {len(shape)} dimensions, the rule needs {len(letters)} ({layout})"
                continue
            for letter, size in zip(letters, shape, strict=True):
                known, owner = sizes.setdefault(letter, (expr(size), name))
                if known != expr(size):
                    yield f"{letter} is {known} in {owner} and {expr(size)} in {name}"


@dataclass
class Miss:
    """The attempt at a pattern that got furthest, and the first clause that failed there.

    change    what would have to stand there, where `why` is no Refusal, which says it itself
    """

    depth: int = -1
    why: str = ""
    change: str = ""


def _made(term: Any, match: Match) -> Iterator[Any]:
    """The node that a term is, of alternatives the one that matched."""
    if isinstance(term, Either):
        for _, option in term.options:
            yield from _made(option, match)
    elif term in match.terms:
        yield match.terms[term]


class _Matcher:
    def __init__(self) -> None:
        self.miss = Miss()

    def fail(self, so_far: Match, why: str, change: str) -> None:
        if len(so_far.terms) > self.miss.depth:
            self.miss = Miss(len(so_far.terms), why, change)

    def match(self, term: Any, subject: Any, so_far: Match) -> Iterator[Match]:
        if term is ANY:
            yield so_far
        elif isinstance(term, Var):
            yield from self.variable(term, subject, so_far)
        elif isinstance(term, Either):
            for tag, option in term.options:
                for match in self.match(option, subject, so_far):
                    yield replace(match, tags=match.tags | {tag})
        elif isinstance(term, Result):
            yield from self.result(term, subject, so_far)
        elif isinstance(term, Term):
            yield from self.call(term, subject, so_far)
        elif isinstance(term, (list, tuple)):
            yield from self.sequence(list(term), subject, so_far)
        elif same(term, subject):
            yield so_far
        else:
            self.fail(so_far, f"it is {_show(subject)}, the pattern has {term!r}", f"{term!r} there")

    def variable(self, term: Var, subject: Any, so_far: Match) -> Iterator[Match]:
        if term.name not in so_far.bound:
            yield replace(so_far, bound=so_far.bound | {term.name: subject})
        elif same(so_far.bound[term.name], subject):
            yield so_far
        else:
            known = _show(so_far.bound[term.name])
            why = f"{term.name} is {known} in one place and {_show(subject)} in another"
            self.fail(so_far, why, f"the same {term.name} in both places")

    def result(self, term: Result, subject: Any, so_far: Match) -> Iterator[Match]:
        if is_call(subject, operator.getitem) and subject.args[1] == term.index:
            for match in self.match(term.term, subject.args[0], so_far):
                yield replace(match, terms=match.terms | {term: subject})
        else:
            wanted = f"result {term.index} of {term.term.target}"
            self.fail(so_far, f"{_show(subject)} is not {wanted}", f"{wanted} in its place")

    def call(self, term: Term, subject: Any, so_far: Match) -> Iterator[Match]:
        if term in so_far.terms:
            if so_far.terms[term] is subject:
                yield so_far
            return
        if not is_call(subject, term.target):
            name = target_name(term.target)
            shown = _show(subject)
            self.fail(
                so_far, f"{shown} stands where the pattern has {name}", f"{name} in the place of {shown}"
            )
            return
        given = arguments(subject)
        orders = [given]
        if term.target in _COMMUTE:
            first, second = list(given)[:2]
            orders.append({**given, first: given[second], second: given[first]})
        start = replace(so_far, terms=so_far.terms | {term: subject})
        for order in orders:
            yield from self.arguments(term, list(term.args), order, start)

    def arguments(
        self, term: Term, names: list[str], given: dict[str, Any], so_far: Match
    ) -> Iterator[Match]:
        if not names:
            yield so_far
            return
        first, *rest = names
        furthest = self.miss
        matched = False
        for match in self.match(term.args[first], given[first], so_far):
            matched = True
            yield from self.arguments(term, rest, given, match)
        if not matched and self.miss is not furthest and not isinstance(term.args[first], Term):
            of = f"argument {first!r} of {target_name(term.target)}"
            self.miss.why, self.miss.change = f"{of}: {self.miss.why}", f"{self.miss.change}, as {of}"

    def sequence(self, terms: list[Any], subject: Any, so_far: Match) -> Iterator[Match]:
        if not isinstance(subject, (list, tuple)) or len(subject) != len(terms):
            why = f"it is {_show(subject)}, the pattern has {len(terms)} items"
            self.fail(so_far, why, f"{len(terms)} items there")
            return
        if not terms:
            yield so_far
            return
        for match in self.match(terms[0], subject[0], so_far):
            yield from self.sequence(terms[1:], list(subject)[1:], match)


def same(a: Any, b: Any) -> bool:
    """Whether two bound values are one: the same node, or equal literals of one kind."""
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    return bool(a == b)


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        if value.op == "call_function":
            return target_name(value.target)
        return f"%{value.name}"
    return repr(value)
