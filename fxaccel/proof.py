"""A match is a hypothesis; here it is tried. The matched nodes and their replacement run side by side.

Both run on random inputs with the site's dtypes and fixed sizes, symbolic sizes once odd and unequal and once
even, with its own strides and with permuted ones, forward and, where gradients flow, backward. Two questions
are asked:

algebra    in float64 both must agree to within what a relative error of 2**-42 in every operator does to
           the original (about a thousand float64 eps: room for another order of summation, not for
           another formula)
rounding   in the site's own dtype the replacement may be at most two bits worse than the original: four
           times the original's own distance from float64 and what an error of one eps in every operator
           does, plus two eps of the largest value. (Two sound orders of summation err by one order of
           magnitude, not by equal amounts: the largest of few errors is a random number. The own distance
           of a float64 site cannot be seen; it is taken for what those errors do.)

What drops values at random is compared with nothing dropped, and its probabilities by themselves.
Passes of class `lower_precision` or `approximate` only have their distance measured and recorded. Sites
with one structure are proved once; the key is a hash of both fragments and their inputs.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import CodeType
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn

from fxaccel.effects import learned
from fxaccel.errors import ProofError
from fxaccel.evaluate import Unsteady, dropped, run_nodes, widen
from fxaccel.ir import Program, SizeSpec, TensorSpec, expr, is_tensor, number, structure
from fxaccel.pattern import Ops
from fxaccel.rule import EXACT
from fxaccel.tolerance import DRAWS, algebra_differs, same_kind, share_of_tolerance

_ODD = (3, 5, 7, 11, 13, 17, 9, 15, 19, 23, 33)
_EVEN = (4, 8, 2, 16, 6, 10, 32, 64, 128)
TRIES = 1000  # of sizes for what a trial reads
STAND_IN = 509  # for a size that a rule says could be any


@dataclass(frozen=True)
class Fragment:
    """Part of a program as a graph of its own, whose placeholders are what it reads."""

    graph: fx.Graph
    root: nn.Module

    @property
    def inputs(self) -> list[fx.Node]:
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def outputs(self) -> list[fx.Node]:
        return list(self.graph.output_node().args[0])

    def __call__(self, values: Sequence[Any], *, double: bool = False) -> list[Any]:
        env: dict[fx.Node, Any] = dict(zip(self.inputs, values, strict=True))
        body = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        run_nodes(body, env, self.root, double=double, still=True)
        return [_comparable(env[n]) for n in self.outputs]

    def drops(self) -> list[float]:
        """The probabilities with which its calls drop values at random."""
        return sorted(p for n in self.graph.nodes if n.op == "call_function" and (p := dropped(n)))

    def resized(self, size: int, to: int) -> Fragment:
        """The same with another fixed size, in shapes of inputs and in lists of sizes."""
        graph, env = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            new = env[node] = graph.node_copy(node, env.__getitem__)
            new.meta = dict(node.meta)
            if node.op == "placeholder" and is_tensor(node.meta["val"]):
                val = node.meta["val"]
                shape = tuple(to if s == size else s for s in map(expr, val.shape))
                stride = tuple(s / size * to if s % size == 0 else s for s in map(expr, val.stride()))
                new.meta["val"] = TensorSpec(val.dtype, shape, stride, val.device)
            elif node.op == "call_function":
                new.args = tuple(
                    [to if a == size else a for a in arg] if isinstance(arg, (list, tuple)) else arg
                    for arg in new.args
                )
        return Fragment(graph, self.root)

    def text(self) -> str:
        """What the fragment computes on what kind of inputs, without names."""
        index = {n: i for i, n in enumerate(self.graph.nodes)}
        leaves = [
            f"{describe(n.meta['val'])} {n.meta.get('learned')} {n.meta.get('number')}" for n in self.inputs
        ]
        body = [n for n in index if n.op not in ("placeholder", "output")]
        done = structure(body, lambda n: f"in{index[n]}")
        return "\n".join([*leaves, done, str([index[o] for o in self.outputs])])


@dataclass(frozen=True)
class Proof:
    """The record of one comparison.

    key         structural hash of the site, shared by all equal sites
    rule        name of the rule
    ok, why     the verdict, and the sentence where it is negative
    error       largest distance of the replacement from the float64 original, over all trials, as a
                share of the tolerance in the site's dtype; gradients in grad_error
    trials      what was run: sizes and layout of each trial
    """

    key: str
    rule: str
    ok: bool
    why: str = ""
    error: float = 0.0
    grad_error: float = 0.0
    trials: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """That two fragments compute the same, to a numerics class.

    note     at which fixed size, where it is not the site's
    whole    the same at the site's size there, which no file keeps
    """

    rule: str
    before: Fragment
    after: Fragment
    numerics: str
    note: str = ""
    whole: Claim | None = None

    def smaller(self, size: int | None) -> Claim:
        """The same of a smaller size in the place of a large one, None for none that could be any other."""
        if size is None or size <= STAND_IN:
            return self
        before, after = (part.resized(size, STAND_IN) for part in (self.before, self.after))
        return Claim(self.rule, before, after, self.numerics, f", {STAND_IN} for {size}", self)


@dataclass
class Manifest:
    """All proofs of a program by key: the claim, its proof, and the number of sites that rest on it."""

    claims: dict[str, Claim] = field(default_factory=dict)
    proofs: dict[str, Proof] = field(default_factory=dict)
    sites: dict[str, int] = field(default_factory=dict)

    def copy(self) -> Manifest:
        return Manifest(dict(self.claims), dict(self.proofs), dict(self.sites))

    def again(self, program: Program) -> list[Proof]:
        """Every proof, run anew."""
        return [_Trial(program, key, claim).prove() for key, claim in self.claims.items()]


def fragment(
    program: Program, nodes: Iterable[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> Fragment:
    """A copy of `nodes` as a function of `inputs`."""
    graph = fx.Graph()
    env = _placeholders(program, graph, inputs)
    for node in _ordered(nodes):
        env[node] = graph.node_copy(node, lambda n: env[n])
        env[node].meta = dict(node.meta)
    graph.output([env[o] for o in outputs])
    return Fragment(graph, program.root)


def composed(
    program: Program, like: fx.Node, inputs: Sequence[fx.Node], build: Callable[[Ops, Any], fx.Node]
) -> Fragment:
    """What `build(op, of)` makes as a function of `inputs`, in the regions of `like`.

    `of(x)` is what stands for the nodes in x.
    """
    graph = fx.Graph()
    env = _placeholders(program, graph, inputs)

    def make(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        node = graph.call_function(target, args, kwargs)
        node.meta = {"regions": like.meta.get("regions", ())}
        return node

    graph.output([build(Ops(make), lambda x: fx.map_arg(x, env.__getitem__))])
    return Fragment(graph, program.root)


def _placeholders(program: Program, graph: fx.Graph, inputs: Sequence[fx.Node]) -> dict[fx.Node, fx.Node]:
    flows, env = program.facts(learned), dict[fx.Node, fx.Node]()
    for node in inputs:
        env[node] = graph.placeholder(node.name)
        env[node].meta = {**node.meta, "learned": node in flows, "number": _number(program, node)}
    return env


def _number(program: Program, node: fx.Node) -> Tensor | None:
    """The constant of one element that a node is: rules may read it, so a trial cannot choose another."""
    slot = program.state.get(node.name) if node.op == "placeholder" else None
    value = program.constants[slot.name] if slot is not None and slot.kind == "constant" else None
    return value if value is not None and value.dim() == 0 else None


def _ordered(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    wanted, done = dict.fromkeys(nodes), dict[fx.Node, None]()

    def visit(node: fx.Node) -> None:
        if node in wanted and node not in done:
            for arg in node.all_input_nodes:
                visit(arg)
            done[node] = None

    for node in wanted:
        visit(node)
    return list(done)


def key(program: Program, claim: Claim) -> str:
    """Hash of what is proved: the rule, both fragments, and the dtypes, sizes and strides they read."""
    parts = [claim.rule, claim.numerics, str(program.grad), claim.before.text(), claim.after.text()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def describe(val: Any) -> str:
    """Dtype, sizes and strides of a node's value, as text that is equal for equal kinds of values."""
    if not is_tensor(val):
        return f"{type(val).__name__} {val}"
    shape, stride = [str(expr(s)) for s in val.shape], [str(expr(s)) for s in val.stride()]
    return f"{val.dtype} {shape} {stride}"


def prove(program: Program, claim: Claim, manifest: Manifest) -> Proof:
    """Try a claim, unless an equal one was tried before; the verdict is kept in the manifest.

    Raises ProofError where the claim is wrong.
    """
    name = key(program, claim)
    if name not in manifest.proofs:
        proof = _Trial(program, name, claim).prove()
        if not proof.ok:
            raise ProofError(f"{claim.rule} failed its proof: {proof.why}")
        manifest.claims[name], manifest.proofs[name] = claim, proof
    manifest.sites[name] = manifest.sites.get(name, 0) + 1
    return manifest.proofs[name]


class _Trial:
    def __init__(self, program: Program, name: str, claim: Claim) -> None:
        self.program, self.name, self.rule = program, name, claim.rule
        self.before, self.after, self.numerics = claim.before, claim.after, claim.numerics
        self.note = claim.note
        regions = self.before.outputs[0].meta.get("regions", ())
        grad = [r.args[0] for r in regions if r.kind == "grad"]
        self.backward = grad[-1] if grad else program.grad
        self.error = self.grad_error = 0.0
        self.trials: list[str] = []

    def prove(self) -> Proof:
        seed = int(self.name, 16) % (1 << 63)
        compared = 0
        drops = self.before.drops(), self.after.drops()
        if drops[0] != drops[1]:
            return self.verdict(False, f"it drops with probabilities {drops[1]}, the original {drops[0]}")
        chosen, names = self.sizes(), self.names()
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad():
            for i, sizes in enumerate([*chosen, self.hints(names)]):
                if i == len(chosen) and (compared or not names):
                    break  # the example's sizes are for an original that takes no others
                for permuted in (False, True):
                    generator = torch.Generator().manual_seed(seed + i)
                    values = [_value(n, sizes, generator, permuted) for n in self.before.inputs]
                    why = self.compare(
                        values, f"sizes {_text(sizes)}{self.note}{', permuted strides' if permuted else ''}"
                    )
                    if why is None:
                        continue
                    if why:
                        return self.verdict(False, why)
                    compared += 1
        if not compared:
            return self.verdict(False, "no random input gave finite values to compare")
        return self.verdict(True, "")

    def verdict(self, ok: bool, why: str) -> Proof:
        return Proof(self.name, self.rule, ok, why, self.error, self.grad_error, tuple(self.trials))

    # -- inputs -----------------------------------------------------------------------------------

    def names(self) -> list[str]:
        return sorted({str(s) for n in self.before.inputs for s in _symbols(n.meta["val"])})

    def hints(self, names: list[str]) -> dict[str, int]:
        return {name: self.program.hints.get(name, 2) for name in names}

    def sizes(self) -> list[dict[str, int]]:
        """Assignments of the symbols: small, unequal and odd; then small and even."""
        names = self.names()
        return [self.assigned(names, _ODD), self.assigned(names, _EVEN)] if names else [{}]

    def assigned(self, names: list[str], wanted: tuple[int, ...]) -> dict[str, int]:
        """Sizes from `wanted` where the guards allow, else others, else those of the example.

        Where the guards want more than that (batch * length of one input equals that of another), sizes of
        one dimension that were equal in the example are chosen together.
        """
        hints = self.hints(names)
        for together in (False, True):
            groups: dict[Any, list[str]] = {}
            for name in names:
                like = (self.program.sizes.get(name, (0, name))[1], hints[name])
                groups.setdefault(like if together else name, []).append(name)
            found = self.fitting([(g, hints[g[0]]) for g in groups.values()], wanted, {}, count())
            if found is not None:
                return found
        return hints

    def fitting(
        self, groups: list[tuple[list[str], int]], wanted: tuple[int, ...], chosen: dict[str, int],
        tries: Iterator[int],
    ) -> dict[str, int] | None:  # fmt: skip
        """The first choice of sizes for the groups, each with that of the example, that the guards allow."""
        if not groups:
            return chosen
        (names, hint), *others = groups
        for size in [c for c in (*wanted, *_ODD, *_EVEN) if c not in chosen.values()] + [hint]:
            if next(tries) > TRIES:
                return None
            tried = chosen | dict.fromkeys(names, size)
            if holds(self.program.guards, tried):
                found = self.fitting(others, wanted, tried, tries)
                if found is not None:
                    return found
        return None

    # -- comparison -------------------------------------------------------------------------------

    def compare(self, values: list[Any], trial: str) -> str | None:
        """ "" where both agree, None where the trial says nothing, else the sentence."""
        wide = [widen(v) for v in values]
        try:
            reference = self.run(self.before, wide, double=True)
        except RuntimeError:
            return None  # the original itself does not take such strides
        if not _informative(reference):
            positive = [_positive(v) for v in values]
            wide = [widen(v) for v in positive]
            reference, values = self.run(self.before, wide, double=True), positive
            if not _informative(reference):
                return None
        old, versions = self.run(self.before, values), _versions(values, wide)
        try:
            new, algebra = self.run(self.after, values), self.run(self.after, wide, double=True)
        except (RuntimeError, TypeError) as error:
            return f"with {trial} the replacement raises {type(error).__name__}: {str(error).splitlines()[0]}"
        if _versions(values, wide) != versions:
            return f"with {trial} the replacement writes to its input"
        self.trials.append(trial)
        moved = [self.unsteady(wide, 1)]
        if self.numerics in EXACT:
            why = algebra_differs(reference, algebra, moved[0])
            if why:
                return f"with {trial} {why}"
        why = self.rounding(reference, moved, old, new)
        if why:  # one draw can be a lucky one
            moved += [self.unsteady(wide, seed) for seed in range(2, DRAWS + 1)]
            own = [self.unsteady(values, seed, double=False) for seed in range(1, DRAWS + 1)]
            why = self.rounding(reference, moved, old, new, own)
        return f"with {trial} {why}" if why else ""

    def unsteady(self, values: list[Any], seed: int, double: bool = True) -> tuple[list[Any], list[Any]]:
        """The original with every operator off by a little: by one eps of its result where not in double."""
        with Unsteady(seed):
            return self.run(self.before, values, double=double)

    def run(self, part: Fragment, values: list[Any], double: bool = False) -> tuple[list[Any], list[Any]]:
        """Outputs and, where gradients flow, the gradients of a random weighting of them."""
        flows = [n.meta.get("learned", True) for n in part.inputs]
        leaves = [_leaf(v, self.backward and f) for v, f in zip(values, flows, strict=True)]
        outputs = part(leaves, double=double)
        wanted = [v for v in leaves if isinstance(v, Tensor) and v.requires_grad]
        flowing = [o for o in outputs if isinstance(o, Tensor) and o.requires_grad]
        if not self.backward or not wanted or not flowing:
            return outputs, []
        weights = [_weights(o) for o in flowing]
        return outputs, list(torch.autograd.grad(flowing, wanted, weights, allow_unused=True))

    def rounding(
        self, reference: Any, moved: list[Any], old: Any, new: Any, own: Sequence[Any] = ()
    ) -> str:  # fmt: skip
        draws, errors = (
            [[[run[kind][i] for run in runs] for i in range(len(old[kind]))] for kind in range(2)]
            for runs in (moved, own)
        )
        for kind, refs, others, errs, olds, news in zip(
            ("output", "gradient"), reference, draws, errors, old, new, strict=True
        ):
            if len(olds) != len(news):
                return f"the original has {len(olds)} {kind}s and the replacement {len(news)}"
            for i, (ref, other, err, o, n) in enumerate(zip(refs, others, errs, olds, news, strict=True)):
                why = same_kind(o, n)
                if why:
                    return f"{kind} {i} {why}"
                if not isinstance(ref, Tensor):
                    continue
                share = share_of_tolerance(ref, o, n, other, err, exact=self.numerics == "bitwise")
                if kind == "output":
                    self.error = max(self.error, share)
                else:
                    self.grad_error = max(self.grad_error, share)
                if share > 1 and self.numerics in EXACT:
                    return f"{kind} {i} is {share:.3g} times the tolerance in {n.dtype} away from float64"
        return ""


def _versions(*groups: list[Any]) -> list[int]:
    """How often each tensor has been written to."""
    return [v._version for values in groups for v in values if isinstance(v, Tensor)]


@functools.lru_cache(maxsize=1024)
def _code(guard: str) -> tuple[CodeType, frozenset[str]]:
    """A guard to be evaluated, and the names in it."""
    tree = ast.parse(guard, mode="eval")
    names = frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))
    return compile(tree, "<guard>", "eval"), names


def holds(guards: Iterable[str], sizes: dict[str, int]) -> bool:
    """Whether every guard whose symbols are all given holds."""
    scope = {
        "__builtins__": {}, "abs": abs, "math": math, "max": max, "min": min, "round": round, **sizes
    }  # fmt: skip
    for guard in guards:
        code, names = _code(guard)
        if names <= scope.keys():
            try:
                fits = eval(code, scope)
            except ZeroDivisionError:  # a guard on a remainder
                return False
            if not fits:
                return False
    return True


# -- random inputs ---------------------------------------------------------------------------------


def _value(node: fx.Node, sizes: dict[str, int], generator: torch.Generator, permuted: bool) -> Any:
    """The constant that an input is, or a random value like the one it has in the graph."""
    number = node.meta.get("number")
    return materialise(node.meta["val"], sizes, generator, permuted) if number is None else number


def materialise(
    val: Any, sizes: dict[str, int], generator: torch.Generator, permuted: bool = False,
    device: torch.device | str = "cpu", scale: float | None = None,
) -> Any:  # fmt: skip
    """A random value with the dtype, sizes and strides of a fake one.

    Floats are normal with this scale, where none is given one between 1/4 and 4, booleans fair coins,
    integers 0 or 1 (an index that is valid everywhere); int8, which is no index, from -127 to 127, and bytes
    0 or anything: they may be a mask or numbers of 4 bits. With `permuted`, tensors of two or more dimensions
    are laid out column-major.
    """
    if isinstance(val, (torch.SymInt, SizeSpec)):
        return number(val, sizes)
    if isinstance(val, (list, tuple)):
        return type(val)(materialise(v, sizes, generator, permuted, device, scale) for v in val)
    if not is_tensor(val):
        return val
    shape, stride = _sizes(val.shape, sizes), _sizes(val.stride(), sizes)
    if permuted and len(shape) >= 2:
        stride = list(torch.empty(shape[::-1], device="meta").permute(*range(len(shape))[::-1]).stride())
    tensor = torch.empty_strided(shape, stride, dtype=val.dtype, device=device)
    compact = [1 if st == 0 else s for s, st in zip(shape, stride, strict=True)]
    tensor.as_strided(compact, stride).copy_(_random(compact, val.dtype, generator, scale))
    return tensor


def _random(
    shape: list[int], dtype: torch.dtype, generator: torch.Generator, scale: float | None = None
) -> Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        if scale is None:
            scale = 4.0 ** (2 * float(torch.rand((), generator=generator)) - 1)
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return (torch.randn(shape, generator=generator, dtype=wide) * scale).to(dtype)
    coins = torch.randint(0, 2, shape, generator=generator)
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, generator=generator).to(dtype)
    if dtype == torch.uint8:
        coins *= torch.randint(1, 256, shape, generator=generator)
    return coins.to(dtype)


def _positive(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype.is_floating_point:
        return value.abs() + 0.25
    return value


def _leaf(value: Any, grad: bool) -> Any:
    if isinstance(value, Tensor):
        floating = value.dtype.is_floating_point or value.dtype.is_complex
        return value.detach().requires_grad_(grad and floating)
    return value


def _weights(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(output.numel())
    weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return weights.to(output.dtype)


def _comparable(value: Any) -> Any:
    """Floats of one byte, which no operator compares, as they are in float32."""
    codes = isinstance(value, Tensor) and value.dtype.is_floating_point and value.itemsize == 1
    return value.float() if codes else value


def _informative(result: tuple[list[Any], list[Any]]) -> bool:
    floats = [t for t in result[0] if isinstance(t, Tensor) and t.dtype.is_floating_point and t.numel()]
    return all(torch.isfinite(t).double().mean() >= 0.5 for t in floats)


def _symbols(val: Any) -> set[sympy.Symbol]:
    found: set[sympy.Symbol] = set()
    for leaf in pytree.tree_leaves(val):
        dims = (*leaf.shape, *leaf.stride()) if is_tensor(leaf) else (leaf,)
        for d in dims:
            if isinstance(d, (torch.SymInt, SizeSpec, sympy.Expr)):
                found |= expr(d).free_symbols
    return found


def _sizes(dims: Iterable[Any], sizes: dict[str, int]) -> list[int]:
    return [number(d, sizes) for d in dims]


def _text(sizes: dict[str, int]) -> str:
    return "as captured" if not sizes else ", ".join(f"{v}" for v in sizes.values())
