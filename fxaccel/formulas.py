"""What one training step takes, as polynomials in the sizes of the inputs.

The step is profiled at a few sizes on fake tensors, and every number of the profile is interpolated, exactly,
in rationals; at further sizes, which were not used, the polynomials must give what the profile gives. What is
a maximum (the bytes that a call takes while it runs) is interpolated moment by moment and the maximum taken
afterwards: at other sizes another moment may be the highest.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property
from math import comb, prod
from operator import mul
from typing import Any

import sympy

from fxaccel.errors import OptionError, RuleError
from fxaccel.ir import Program
from fxaccel.profile import Profile, Watch, watched
from fxaccel.proof import holds
from fxaccel.replay import Draft, lives

TOTAL = 3  # the highest degree of the monomials that are tried first: batch * sequence ** 2

Polynomial = tuple[Fraction, ...]  # a coefficient for each monomial


class Sizes:
    """The sizes that the inputs of a program can have.

    free     size symbols of the program that can be chosen
    bound    others, which its guards bind to those: symbol -> expression
    names    symbol -> what users read: "input_ids.0" is the first dimension of the input of that name
    low      smallest sizes of the free ones
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.bound = _bound(program)
        self.free = [s for s in program.sizes if s not in self.bound]
        self.names = {s: f"{program.inputs[i]}.{d}" for s, (i, d) in program.sizes.items()}
        low = (re.fullmatch(r"(\d+) <= (\w+)", guard) for guard in program.guards)
        lowest = {form[2]: max(1, int(form[1])) for form in low if form}
        self.low = [lowest.get(s, 1) for s in self.free]
        self.hints = tuple(program.hints[s] for s in self.free)

    def all(self, point: Sequence[int]) -> dict[str, int] | None:
        """Every symbol's value where the free ones have these; None where the guards forbid them."""
        chosen = dict(zip(self.free, point, strict=True))
        bound = {s: formula.subs(chosen) for s, formula in self.bound.items()}
        if not all(value.is_Integer for value in bound.values()):
            return None
        chosen |= {s: int(value) for s, value in bound.items()}
        sound = all(size > 0 for size in chosen.values()) and holds(self.program.guards, chosen)
        return chosen if sound else None

    def candidates(self, at: int) -> list[int]:
        """Sizes that a free symbol can have beside the example's, that one first."""
        hint = self.hints[at]
        tried = [hint, 2 * hint, 3 * hint, hint // 2, hint // 4, *(4 * hint - i for i in range(4))]
        tried += [hint + d for i in range(1, 9) for d in (i, -i)]
        found = [size for size in dict.fromkeys(tried) if size >= self.low[at]]
        return [s for s in found if self.all([*self.hints[:at], s, *self.hints[at + 1 :]]) is not None]

    def lattice(self, degrees: Sequence[int], total: int) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Exponents of monomials -> the sizes to take for each; raises RuleError where there are none."""
        axes = [self.candidates(at) for at in range(len(self.free))]
        if all(len(axis) > degree for axis, degree in zip(axes, degrees, strict=True)):
            exponents = itertools.product(*(range(d + 1) for d in degrees))
            points = {
                e: tuple(axis[i] for axis, i in zip(axes, e, strict=True))
                for e in exponents
                if sum(e) <= total
            }  # closed downwards, so that there is one polynomial through any numbers
            if all(self.all(point) is not None for point in points.values()):
                return points
        raise RuleError(f"sizes other than {self.said(self.hints)} are not taken: {self.program.guards}")

    def others(self, points: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Sizes none of which is among those of `points`: near the example, and far from it."""
        used = [set(axis) for axis in zip(*points, strict=True)]
        left = [
            [s for _, s in sorted((abs(s - hint), s) for s in {*self.candidates(at)} - used[at])]
            for at, hint in enumerate(self.hints)
        ]
        far = tuple(sizes[-1] for sizes in left if sizes)
        found = [p for p in zip(*left, strict=False) if self.all(p) is not None]
        if self.free and not found:
            raise RuleError(f"there are no sizes left beside {self.said(self.hints)} to check formulas at")
        return [*found[:1], *([far] if len(far) == len(left) and self.all(far) else found[1:][-1:])]

    def point(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        by_name = {name: symbol for symbol, name in self.names.items()}
        if not sizes.keys() <= by_name.keys():
            raise OptionError(f"{list(sizes)} are not all sizes of the inputs", f"there are {list(by_name)}")
        point = tuple(sizes.get(self.names[s], h) for s, h in zip(self.free, self.hints, strict=True))
        found = self.all(point)
        if found is None or any(found[by_name[name]] != size for name, size in sizes.items()):
            guards = ", ".join(self.program.guards)
            raise OptionError(f"inputs with {dict(sizes)} are not taken", f"sizes must have {guards}")
        return point

    def said(self, point: Sequence[int]) -> str:
        return ", ".join(f"{self.names[s]} = {size}" for s, size in zip(self.free, point, strict=True))


def _bound(program: Program) -> dict[str, sympy.Expr]:
    """Symbols that equations of the guards bind to others: b*s == c*t those of one dimension and size."""
    bound: dict[sympy.Symbol, sympy.Expr] = {}
    order = {sympy.Symbol(s): i for i, s in enumerate(program.sizes)}
    for guard in program.guards:
        tree = ast.parse(guard, mode="eval").body
        if not (isinstance(tree, ast.Compare) and len(tree.ops) == 1 and isinstance(tree.ops[0], ast.Eq)):
            continue
        sides = (ast.unparse(side) for side in (tree.left, tree.comparators[0]))
        left, right = (sympy.sympify(side, {s.name: s for s in order}) for side in sides)
        difference = sympy.expand((left - right).xreplace(bound))
        symbols = sorted(difference.free_symbols, key=order.__getitem__)
        likes: dict[object, sympy.Symbol] = {}
        same = {s: likes.setdefault((program.sizes[s.name][1], program.hints[s.name]), s) for s in symbols}
        if symbols and sympy.expand(difference.xreplace(same)) != 0:
            same = _solved(difference, symbols)
        bound = {s: e.xreplace(same) for s, e in bound.items()}
        bound |= {s: e for s, e in same.items() if s != e}
    return {s.name: e for s, e in bound.items()}


def _solved(difference: sympy.Expr, symbols: Sequence[sympy.Symbol]) -> dict[sympy.Symbol, sympy.Expr]:
    """The last symbol that the equation difference = 0 gives as a polynomial in the others."""
    for symbol in reversed(symbols):
        found = sympy.solve(difference, symbol) if difference.is_polynomial(*symbols) else []
        if len(found) == 1 and found[0].is_polynomial(*symbols):
            return {symbol: found[0]}
    return {}


@dataclass(frozen=True)
class Traced:
    """A profile, and for each call the bytes after each operator of its forward and of its backward."""

    profile: Profile
    moments: dict[int, tuple[list[int], list[int]]]

    def numbers(self) -> list[tuple[str, int]]:
        """Every number that depends on sizes, with the name of what it is of."""
        found = [(value.name, value.nbytes) for value in self.profile.values]
        for index, call in self.profile.calls.items():
            own = call.rest, call.grads, call.flops, call.nbytes, *itertools.chain(*self.moments[index])
            found += [(call.name, number) for number in own]
        return [*found, ("the gradients", self.profile.grads)]

    def shape(self) -> Iterator[tuple[str, object]]:
        """All else, which must be equal at all sizes."""
        for value in self.profile.values:
            yield value.name, (value.made, value.read, value.needed, value.shown)
        for index, call in self.profile.calls.items():
            own = index, call.makes, call.hides, call.reads, call.again, call.view
            yield call.name, (own, [len(m) for m in self.moments[index]])

    def filled(
        self, numbers: Sequence[Any], one: Callable[[Any], Any], most: Callable[[list[Any]], Any]
    ) -> Profile:
        """The profile with other numbers, in the order of `numbers`; `most` takes maxima."""
        left = iter(numbers)
        values = [replace(v, nbytes=one(next(left)), needed=list(v.needed)) for v in self.profile.values]
        calls = {}
        for index, call in self.profile.calls.items():
            rest, grads, flops, nbytes = itertools.islice(left, 4)
            forward, backward = ([next(left) for _ in m] for m in self.moments[index])
            calls[index] = replace(
                call, takes=most(forward), rest=one(rest), surge=most([rest, *backward]), grads=one(grads),
                flops=one(flops), nbytes=one(nbytes),
            )  # fmt: skip
        return replace(self.profile, values=values, calls=calls, grads=one(next(left)))


class _Trace(Watch):
    """A watch that notes every moment."""

    def __init__(self, program: Program) -> None:
        super().__init__(program)
        self.moments: dict[int, tuple[list[int], list[int]]] = {}
        self.running = -1

    def at(self, index: int, function: Any = None, *given: Any) -> None:
        super().at(index, function, *given)
        self.moments[index], self.running = ([], []), index

    def made(self, index: int, value: Any) -> None:
        super().made(index, value)
        self.running = -1

    def enter(self) -> None:
        present = self.present
        super().enter()
        if self.present != present:
            self.moments[self.present][1].clear()

    def spent(self) -> None:
        super().spent()
        if self.returning and self.present >= 0:
            self.moments[self.present][1].append(self.meter.rest)
        elif self.running >= 0:
            self.moments[self.running][0].append(self.meter.live - self.before)

    def traced(self) -> Traced:
        """What has been seen; its maxima are those of the moments."""
        found = self.profile()
        for index, call in found.calls.items():
            forward, backward = self.moments[index]
            if not call.takes:
                forward.clear()
            maxima = max(forward, default=0), max([call.rest, *backward])
            assert maxima == (call.takes, call.surge), f"the moments of {call.name} miss its peak"
        return Traced(found, self.moments)


def traced(program: Program) -> Traced:
    """The profile of a training step, with its moments."""
    return watched(program, _Trace).traced()


class Formulas:
    """One training step of a program at any sizes.

    sizes    that its inputs can have;  base: the step at those of the example
    peak     the most bytes that live at once where everything is kept, parameters and buffers left out
    inner    the same without the gradients of parameters

    Raises RuleError where no polynomials of degree two fit: an operator chooses by its sizes, say.
    """

    def __init__(self, program: Program) -> None:
        self.program, self.sizes = program, Sizes(program)
        self.base = traced(program)
        self.known = {self.sizes.hints: self.base}
        first = [1 if program.sizes[s][1] == 0 else 2 for s in self.sizes.free]  # batches are linear
        wrong = ""
        for degrees, total in ((first, TOTAL), ([2] * len(first), TOTAL + 1)):
            points = self.sizes.lattice(degrees, total)
            self.fit(points)
            wrong = self.checked(points)
            if not wrong:
                return
        raise RuleError(wrong)

    def taken(self, point: tuple[int, ...]) -> Traced:
        if point not in self.known:
            found = traced(replace(self.program, hints=self.sizes.all(point) or {}))
            pairs = itertools.zip_longest(self.base.shape(), found.shape())
            other = next(((ours or theirs)[0] for ours, theirs in pairs if ours != theirs), None)
            if other is not None:
                raise RuleError(f"{other} goes another way at {self.sizes.said(point)}: there is no formula")
            self.known[point] = found
        return self.known[point]

    def fit(self, points: Mapping[tuple[int, ...], tuple[int, ...]]) -> None:
        """The polynomials through what is found at these points, equal ones once."""
        self.exponents = list(points)
        rows = [_monomials(self.exponents, point) for point in points.values()]
        inverse = [[Fraction(int(v.p), int(v.q)) for v in row] for row in sympy.Matrix(rows).inv().tolist()]
        samples = list(zip(*([n for _, n in self.taken(p).numbers()] for p in points.values()), strict=True))
        number = {sample: i for i, sample in enumerate(dict.fromkeys(samples))}
        self.places = [number[sample] for sample in samples]
        self.table = [
            tuple(sum((a * b for a, b in zip(row, sample, strict=True) if b), Fraction()) for row in inverse)
            for sample in number
        ]

    def checked(self, points: Mapping[tuple[int, ...], tuple[int, ...]]) -> str:
        """What does not fit at sizes that are not among the points, "" where all does."""
        for point in self.sizes.others(list(points.values())):
            found, ours = self.taken(point), self.evaluated(point)
            for (name, number), place in zip(found.numbers(), self.places, strict=True):
                if ours[place] != number:
                    return (
                        f"what {name} takes at {self.sizes.said(point)} follows no polynomial of degree "
                        f"two: {number} instead of {ours[place]}"
                    )
        return ""

    def evaluated(self, point: Sequence[int]) -> list[Fraction]:
        monomials = _monomials(self.exponents, point)
        return [sum((c * m for c, m in zip(p, monomials, strict=True) if c), Fraction()) for p in self.table]

    def at(self, sizes: Mapping[str, int]) -> Profile:
        """The profile at these sizes, by their readable names; those of the example where none is given."""
        table = [int(number) for number in self.evaluated(self.sizes.point(sizes))]
        return self.base.filled([table[i] for i in self.places], int, lambda found: max(found, default=0))

    @cached_property
    def symbols(self) -> dict[str, sympy.Symbol]:
        """The symbols of the expressions by their names, "input_ids.0"."""
        names = [self.sizes.names[s] for s in self.sizes.free]
        return {name: sympy.Symbol(name, integer=True, positive=True) for name in names}

    @cached_property
    def expressions(self) -> Profile:
        """The profile with an expression in the place of each number."""
        one, most = cache(self.expression), cache(self.maximum)
        return self.base.filled([self.table[i] for i in self.places], one, lambda found: most(tuple(found)))

    @cached_property
    def peak(self) -> sympy.Expr:
        return self.maximum([p for p, _ in self.steps()])

    @cached_property
    def inner(self) -> sympy.Expr:
        return self.maximum([p for _, p in self.steps()])

    def expression(self, polynomial: Polynomial) -> sympy.Expr:
        symbols, found = self.symbols.values(), sympy.Integer(0)
        for c, e in zip(polynomial, self.exponents, strict=True):
            monomial = sympy.prod([s**i for s, i in zip(symbols, e, strict=True)])
            found += sympy.Rational(c.numerator, c.denominator) * monomial
        return found

    def maximum(self, polynomials: Sequence[Polynomial]) -> sympy.Expr:
        """Of all of them; those left out that another is above at all sizes."""
        best: dict[Polynomial, Polynomial] = {}  # shifted -> as it is
        for one in dict.fromkeys(polynomials):
            own = self.shifted(one)
            if not any(_above(other, other, own) for other in best):
                best = {s: p for s, p in best.items() if not _above(own, own, s)}
                best[own] = one
        if len(best) < 3:
            tops = set(best)
        else:  # most of those that are left lie between two that are highest somewhere
            sizes = itertools.product([4**i for i in range(10)], repeat=min(2, len(self.symbols)))
            points = ((*size, *size[-1:] * len(self.symbols))[: len(self.symbols)] for size in sizes)
            rows = [_monomials(self.exponents, point) for point in points]
            tops = {max((sum(map(mul, s, row)), s) for s in best)[1] for row in rows}
        pairs = list(itertools.combinations(tops, 2))
        left = [p for s, p in best.items() if s in tops or not any(_above(a, b, s) for a, b in pairs)]
        found = [self.expression(p) for p in left]
        return sympy.Max(*found, evaluate=False) if len(found) > 1 else sympy.Add(*found)

    def shifted(self, polynomial: Polynomial) -> Polynomial:
        """In what the sizes are above their smallest: then it is nowhere negative if no coefficient is."""
        found = dict.fromkeys(self.exponents, Fraction())
        for c, e in zip(polynomial, self.exponents, strict=True):
            for lower in itertools.product(*(range(i + 1) for i in e)) if c else ():
                parts = zip(e, lower, self.sizes.low, strict=True)
                found[lower] += c * prod(comb(i, k) * low ** (i - k) for i, k, low in parts)
        return tuple(found.values())

    def steps(self) -> Iterator[tuple[Polynomial, Polynomial]]:
        """What lives at each moment, as fxaccel.replay counts, with parameters' gradients and without."""
        profile, left = self.base.profile, iter([self.table[i] for i in self.places])
        values, calls, lowest = profile.values, profile.calls, lives(profile, Draft()).lowest
        size, zero = max(calls, default=0) + 2, (Fraction(),) * len(self.exponents)
        forward, backward = ([zero] * (size + 1) for _ in range(2))
        for number, (value, nbytes) in enumerate(zip(values, left, strict=False)):
            last = size - 1 if number in lowest or value.shown else max(value.read, value.made)
            forward[value.made + 1] = _sum(forward[value.made + 1], nbytes)
            forward[last + 1] = _sum(forward[last + 1], nbytes, -1)
            low = 0 if value.shown else lowest.get(number, size)
            backward[low] = _sum(backward[low], nbytes)
        before, after = list(itertools.accumulate(forward, _sum)), list(itertools.accumulate(backward, _sum))
        for index in calls:
            rest, grads, _, _ = itertools.islice(left, 4)
            for moment in [zero, *itertools.islice(left, len(self.base.moments[index][0]))]:
                yield (_sum(before[index], moment),) * 2
            for moment in [rest, *itertools.islice(left, len(self.base.moments[index][1]))]:
                found = _sum(after[index], moment)
                yield found, _sum(found, grads, -1)


def _monomials(exponents: Sequence[tuple[int, ...]], point: Sequence[int]) -> list[int]:
    return [prod(size**i for size, i in zip(point, e, strict=True)) for e in exponents]


def _sum(a: Polynomial, b: Polynomial, times: int = 1) -> Polynomial:
    return tuple(x + times * y for x, y in zip(a, b, strict=True))


def _above(a: Polynomial, b: Polynomial, least: Polynomial) -> bool:
    """Whether a share of one and the rest of the other are together at least `least`, by coefficients."""
    low, high = Fraction(0), Fraction(1)
    for x, y, z in zip(a, b, least, strict=True):
        if x == y and z > x:
            return False
        if x > y:
            low = max(low, (z - y) / (x - y))
        elif x < y:
            high = min(high, (z - y) / (x - y))
    return low <= high
