"""The canonical form: one spelling for each meaning, so that a rule needs one pattern.

`canonicalize(program)` rewrites the graph in place until no step has anything to do. Every step is small,
local and named; `steps()` lists them with their sentences, and what `canonicalize` returns counts them. The
numerics class is `reassociated`: a product may be scaled after instead of before, a written-out operator may
become the one kernel that computes it. Patterns may rely on this:

Calls
    arguments      positional where the schema allows, trailing defaults left out, a keyword-only argument
                   only where it is not the default; dimensions count from the front; other names of one
                   operator (`multiply`, `special_expit`, `__and__`, `mul.Scalar`, ...) are not used
    numbers        second operand; floats beside floating tensors, but integral exponents are ints; a
                   constant 0-d tensor is a number; `x - 2` is `add(x, -2)`, `2 - x` is `rsub.Scalar(x, 2)`
    order          commuting operands (add, mul, eq, ne, and, or, maximum, minimum): computed values before
                   parameters; more dimensions before fewer, fewer sizes of 1 before more; an operand before
                   one that is computed from it (`add(x, f(x))`); operators of one tensor before those of
                   several (`mul(silu(gate), up)`); then by what they are, never by name or by time
    sizes          every varying size is one node at the top; in a list of sizes, fixed ones are ints and
                   the one that varies is -1, or two and more are their nodes
Gone               assertions on metadata; casts, moves, expands, slices, reshapes, permutes, copies,
                   dropouts, detaches that do nothing; x * 1, x / 1, x + 0, x ** 1; --x; widening casts
                   before another cast; in-place operators on the model's own values, tensors filled part by
                   part (`cat`); equal values computed twice; dead code
Shapes
    permuting      `permute` with all dimensions, never two in a row; before a reshape that keeps the
                   dimensions it touches
    reshaping      `reshape`, never two in a row, through copies too; one that only adds sizes of 1 is one
                   `unsqueeze` for each, ascending; one that only drops them is `squeeze.dims`. It stands
                   after elementwise operators, and after softmax, linear and norms of a last dimension that
                   it keeps
    broadcasting   `expand` to as many dimensions, -1 where a size stays; none that the reader would make up
                   for (elementwise operators and the batch of a matmul); repeated heads are unsqueeze,
                   expand, reshape
    parts          all parts used: `split.Tensor` (equal), `split_with_sizes` (unequal), `unbind`; else
                   `slice.Tensor` and `select.int`
Products
    linear         `linear(x, W, b)` wherever the right operand is a matrix and either x has three or more
                   dimensions or only the matrix is made of parameters; W is `permute(w, [1, 0])` where the
                   model holds it transposed; b is 1-d. No rows are flattened around it
    matmul         every other product (mm, bmm, baddbmm, einsum, ...), on values with their own batch
                   dimensions; alpha and beta are written out
    scale          after the product, one `mul` by a number of 15 digits, before a bias or mask is added. In
                   float16 a scale below 1 on an operand stays there, since the product could overflow
Arithmetic
    powers         `pow(x, 2)` for x * x and square, `pow(x, 3)`; `sqrt`, `rsqrt`, `reciprocal`;
                   x / sqrt(v) is `mul(x, rsqrt(v))`; x * (1 / y) is `div(x, y)`; dividing by a power of
                   two is `mul`
    signs          `sub` and `neg`, no `add` of a `neg`, no alpha
    averages       `mean.dim` for a sum over its count; `var.correction` for every variance, also written as
                   a mean of squares; a dtype argument of sum, mean, softmax is a cast before
    comparisons    `gt`, `ge`, `eq`, `ne` of tensors; Scalar overloads with numbers; logic is bitwise
    choice         `where` for masked_fill, its condition never a `not`
    creation       `full` with dtype and device, `arange` with as few arguments as say the same
Idioms             sigmoid, silu, mish, gelu (erf and tanh), softmax, log_softmax, logsumexp,
                   `layer_norm(x, [C], w, b, eps)`, `rms_norm(x, [C], w, eps)`. A norm in float32
                   inside of a half model keeps its casts: `to(x, f32)`, `rms_norm` without a weight,
                   `to(.., f16)`, `mul` by the weight
Order of nodes     depth first from the outputs, operands in order; effects (writes, random numbers) keep
                   their order, and what touches a written storage its order to the writes; regions stay
                   together. Calls are named after their operator and numbered

Under autocast only steps that touch no arithmetic are taken. Nodes of different regions are never combined.
Values whose storage is written to at or after them are left alone. An output never becomes an alias of an
input or of another output that it was not, and the set of parameters with a gradient stays as it is.
"""

from __future__ import annotations

from torch import fx

from fxaccel.canonical import arguments, arithmetic, idiom, motion, norm, parts, product, shape  # noqa: F401
from fxaccel.canonical.arguments import normal_arguments
from fxaccel.canonical.editor import BY, ORDER, STEPS, UNDER_AUTOCAST, Editor, aten
from fxaccel.canonical.effects import functionalise
from fxaccel.canonical.filling import put_together
from fxaccel.canonical.order import lay_out, merge_equal, rename, schedule, sort_operands
from fxaccel.canonical.product import round_scales
from fxaccel.canonical.values import under_autocast
from fxaccel.effects import eliminate_dead
from fxaccel.errors import RuleError
from fxaccel.ir import Program

_ROUNDS = 40


def canonicalize(program: Program) -> list[str]:
    """Bring `program` to the canonical form, in place; returns what was done, one line a step."""
    e = Editor(program)
    for _ in range(_ROUNDS):
        if not _round(e):
            if e.late:
                break
            e.late = True
    else:
        raise RuleError(f"the canonical form was not reached in {_ROUNDS} rounds: {dict(e.counts)}")
    if schedule(program):
        e.counts["schedule"] += 1
    rename(program)
    drop_constants(program)
    program.changed()
    return [f"{name} x {n}" for name, n in e.counts.items() if n]


def drop_constants(program: Program) -> None:
    """Erase constants that nothing reads any more."""
    for node in list(program.graph.nodes):
        slot = program.state.get(node.name) if node.op == "placeholder" else None
        if slot is not None and slot.kind == "constant" and not node.users:
            del program.state[node.name], program.constants[slot.name]
            program.graph.erase_node(node)


def tidy(program: Program) -> None:
    """What the form holds of any graph, after a pass: one node for each value."""
    e = Editor(program)
    if merge_equal(e):
        eliminate_dead(e.graph)
    program.changed()


def _round(e: Editor) -> bool:
    """One sweep over the graph and one look at it as a whole; whether anything changed."""
    before = e.counts.total()
    e.refresh()
    e.counts["functionalise"] += functionalise(e)
    e.counts["put_together"] += put_together(e)
    if e.counts.total() != before:
        e.refresh()
    for node in list(e.graph.nodes):
        if not node._erased and node.op == "call_function":
            _settle(e, node)
    if e.counts.total() == before:
        e.counts["round_scales"] += round_scales(e)
        e.counts["sort_operands"] += sort_operands(e)
        e.counts["lay_out"] += lay_out(e)
    e.drop_idle_sizes()  # which is nothing done: the next round would ask for them again
    e.counts["eliminate_dead"] += eliminate_dead(e.graph)
    e.counts["merge_equal"] += merge_equal(e)
    return e.counts.total() != before


def _settle(e: Editor, node: fx.Node) -> None:
    """Run the steps for one node until none has anything to do."""
    e.regions = node.meta.get("regions", ())
    frozen = e.storage.frozen(node) and node.target is not aten._assert_tensor_metadata.default
    autocast = under_autocast(e.regions)
    if not frozen and normal_arguments(e, node):
        e.counts["normal_arguments"] += 1
    changed = not frozen
    while changed:
        changed = False
        for step in STEPS.get(node.target, ()):
            if autocast and step not in UNDER_AUTOCAST:
                continue
            new = step(e, node)
            if new is None or (new is not node and e.shown(node, new)):
                if new is not None:
                    e.erase(new)  # a step that is not taken
                continue
            e.counts[step.__name__] += 1
            if new is not node:
                e.replace(node, new)
            if new._erased or (new is not node and new.meta.get("by") != BY):
                return
            node, changed = new, True
            normal_arguments(e, node)
            break


def steps() -> list[tuple[str, str]]:
    """Every step of the form with its sentence, in the order in which they are tried."""
    whole = [
        functionalise,
        put_together,
        normal_arguments,
        *ORDER,
        merge_equal,
        round_scales,
        sort_operands,
        schedule,
    ]
    return [(s.__name__, (s.__doc__ or "").splitlines()[0]) for s in whole]
