"""The canonical form: spellings collapse, near spellings do not, and nothing is computed that was not before."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxaccel.canonical import canonicalize, steps
from fxaccel.capture import capture
from fxaccel.evaluate import run, run_nodes
from fxaccel.ir import Program, expr
from fxaccel.listing import lines, listing
from tests import spellings_attention  # noqa: F401  (adds to the table)
from tests.spellings import IDIOMS, Function, Idiom, Written

# -- what the tests ask ----------------------------------------------------------------------------


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def state_of(program: Program, module: nn.Module) -> dict[str, Tensor]:
    named = tensors_of(module)
    return {
        placeholder: (program.constants[slot.name] if slot.kind == "constant" else named[slot.name])
        for placeholder, slot in program.state.items()
    }


def text(program: Program) -> str:
    """The listing without where each node came from."""
    bare = [
        f"{' '.join(line.results)} = {line.op}({line.args}) : {line.type}"
        for _, line in lines(program, ends=True)
    ]
    return "\n".join(bare)


def inputs_of(shapes) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator) for shape in shapes]


def larger(program: Program, inputs: list[Tensor], grow: int) -> list[Tensor]:
    """Inputs whose free sizes are larger by `grow`, each by one more than the last."""
    sizes = {s: n + grow + i for i, (s, n) in enumerate(program.hints.items())}
    names = [n for n in program.inputs if n is not None]
    shapes = [[_at(s, sizes) for s in program.placeholder(n).meta["val"].shape] for n in names]
    generator = torch.Generator().manual_seed(grow)
    return [
        torch.randn(shape, generator=generator).to(x.dtype) if x.is_floating_point() else x.new_zeros(shape)
        for shape, x in zip(shapes, inputs, strict=True)
    ]


def results(program: Program, state: dict[str, Tensor], leaves: list[Tensor], *, double: bool = True):
    """Outputs and the gradients of a weighted sum of them, in double precision."""
    cast = (lambda t: t.detach().double()) if double else (lambda t: t.detach().clone())
    state = {
        k: cast(v).requires_grad_(v.requires_grad) if v.is_floating_point() else v.clone()
        for k, v in state.items()
    }
    leaves = [cast(x).requires_grad_() if x.is_floating_point() else x for x in leaves]
    torch.manual_seed(7)
    outputs = run(program, state, leaves, double=double)
    total = sum(
        (o * torch.arange(o.numel()).view(o.shape).cos()).sum() for o in outputs if o.is_floating_point()
    )
    wanted = [t for t in (*state.values(), *leaves) if t.requires_grad]
    gradients = (
        torch.autograd.grad(total, wanted, allow_unused=True)
        if isinstance(total, Tensor) and total.requires_grad
        else []
    )
    return outputs, list(gradients)


def check(
    module: nn.Module, inputs: list[Tensor], *, grow: tuple[int, ...] = (1, 3), tolerance: float = 1e-6
) -> Program:
    """Canonicalize a captured call; values, gradients, dtypes, shapes and idempotence must hold."""
    before = capture(module, tuple(inputs), {})
    after = before.copy()
    guards = len(_guards(after))
    canonicalize(after)
    after.graph.lint()
    assert len(_guards(after)) == guards, "a guard was added"
    first = listing(after, ends=True)
    assert canonicalize(after) == [], "a second run finds something to do"
    assert listing(after, ends=True) == first
    for leaves in [inputs, *(larger(before, inputs, g) for g in grow)]:
        _agree(before, after, module, leaves, tolerance)
    _metadata(before, after, module, inputs)
    return after


def _guards(program: Program):
    for node in program.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if hasattr(leaf, "fake_mode") and leaf.fake_mode.shape_env is not None:
                return leaf.fake_mode.shape_env.guards
    return []


def _agree(
    before: Program, after: Program, module: nn.Module, leaves: list[Tensor], tolerance: float
) -> None:
    state = state_of(before, module)
    old, old_gradients = results(before, state, leaves)
    new, new_gradients = results(after, state, leaves)
    for a, b in zip(old, new, strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance, equal_nan=True)
    for a, b in zip(old_gradients, new_gradients, strict=True):
        assert (a is None) == (b is None), "a gradient came or went"
        if a is not None:
            torch.testing.assert_close(b, a, rtol=10 * tolerance, atol=10 * tolerance, equal_nan=True)


def _metadata(before: Program, after: Program, module: nn.Module, leaves: list[Tensor]) -> None:
    """Every value is of the dtype, shape and layout that its meta says; outputs are as they were."""
    env = {}
    state = {k: v.detach().clone() for k, v in state_of(after, module).items()}
    given = {n: leaves[i] for i, n in enumerate(after.inputs) if n is not None}
    for node in after.graph.nodes:
        if node.op == "placeholder":
            env[node] = state[node.name] if node.name in state else given[node.name].clone()
    body = [n for n in after.graph.nodes if n.op not in ("placeholder", "output")]
    run_nodes(body, env, after.root)
    symbols = {s: leaves[i].shape[d] for s, (i, d) in after.sizes.items()}
    for node in body:
        for real, fake in zip(
            pytree.tree_leaves(env[node]), pytree.tree_leaves(node.meta["val"]), strict=True
        ):
            if isinstance(real, Tensor):
                assert real.dtype == fake.dtype, node.format_node()
                assert list(real.shape) == [_at(s, symbols) for s in fake.shape], node.format_node()
                strides = [
                    (a, _at(b, symbols))
                    for a, b, n in zip(real.stride(), fake.stride(), real.shape, strict=True)
                    if n > 1
                ]
                assert all(a == b for a, b in strides), f"{node.format_node()}: {strides}"
    old, new = (
        run(before, state_of(before, module), list(leaves)),
        run(after, state_of(after, module), list(leaves)),
    )
    for a, b in zip(pytree.tree_leaves(old), pytree.tree_leaves(new), strict=True):
        if not isinstance(a, Tensor):
            assert a == b
            continue
        assert (a.dtype, a.shape, a.stride(), a.device) == (b.dtype, b.shape, b.stride(), b.device)


def _at(size, symbols) -> int:
    e = expr(size)
    return int(e.subs({s: symbols[str(s)] for s in e.free_symbols}))


# -- spellings -------------------------------------------------------------------------------------

FORMS: dict[str, str] = {}


def canonical(idiom: Idiom, function: Function) -> Program:
    torch.manual_seed(0)
    return check(Written(function, idiom.state), inputs_of(idiom.inputs))


def form(idiom: Idiom) -> str:
    """The canonical form of the first spelling."""
    if idiom.name not in FORMS:
        FORMS[idiom.name] = text(canonical(idiom, idiom.same[0]))
    return FORMS[idiom.name]


def cases(kind: str):
    return [pytest.param(i, f, id=f"{i.name}-{n}") for i in IDIOMS for n, f in enumerate(getattr(i, kind))]


@pytest.mark.parametrize(("idiom", "function"), cases("same"))
def test_spellings_collapse(idiom: Idiom, function: Function):
    program = canonical(idiom, function)
    assert text(program) == form(idiom)
    found = [line.op for _, line in lines(program)]
    for op in idiom.ops:
        assert any(op == f.split(".")[1] for f in found), f"no {op} in\n{listing(program)}"


@pytest.mark.parametrize(("idiom", "function"), cases("other"))
def test_near_spellings_stay_apart(idiom: Idiom, function: Function):
    assert text(canonical(idiom, function)) != form(idiom)


def test_enough_spellings():
    assert len(IDIOMS) >= 14
    assert sum(len(i.same) for i in IDIOMS) >= 80
    assert sum(len(i.other) for i in IDIOMS) >= 40


# -- traps -----------------------------------------------------------------------------------------


def canonical_of(
    function: Function, *inputs: Tensor, train: bool = True, **state: tuple[int, ...]
) -> Program:
    """The canonical form of a function, its values checked."""
    module = Written(function, state).train(train)
    return check(module, list(inputs) or [torch.randn(2, 5, 12)])


def ops(program: Program) -> list[str]:
    return [line.op.removeprefix("aten.") for _, line in lines(program)]


IN_PLACE = {
    "relu_ of a temporary": (lambda m, x: torch.relu_(x * 2), ["mul.Tensor", "relu"]),
    "add_ read before and after": (
        lambda m, x: ((y := x * 2).exp(), y.add_(1).sin(), y.cos()),
        ["mul.Tensor", "exp", "add.Tensor", "sin", "cos"],
    ),
    "a view is read later": (
        lambda m, x: [v for y in [x * 2] for v in [y.select(1, 0)] for _ in [y.add_(1)] if v is not None][0],
        ["mul.Tensor", "select.int", "add_.Tensor"],
    ),
    "a slice is written": (
        lambda m, x: [y for y in [x * 2] for _ in [y.narrow(1, 0, 2).add_(1)]][0],
        ["mul.Tensor", "narrow", "add_.Tensor"],
    ),
    "an input is written": (lambda m, x: x.add_(1) * 2, ["add_.Tensor", "mul.Tensor"]),
    "twice": (lambda m, x: (x * 2).add_(1).mul_(3).sin(), ["mul.Tensor", "add.Tensor", "mul.Tensor", "sin"]),
    "read between writes": (
        lambda m, x: [a + y for y in [x * 2] for a in [y * 1] for _ in [y.select(1, 0).zero_()]][0],
        ["mul.Tensor", "mul.Tensor", "select.int", "zero_", "add.Tensor"],
    ),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operators(name: str):
    """A write becomes a new value only where nobody can tell."""
    function, want = IN_PLACE[name]
    program = capture(Written(function, {}), (torch.randn(2, 5, 12),), {})
    before = program.copy()
    canonicalize(program)
    assert sorted(ops(program)) == sorted(want), listing(program)
    x, y = (torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1)) for _ in "ab")
    old, new = run(before, state_of(before, Written(function, {})), [x]), run(program, {}, [y])
    for a, b in zip([*old, x], [*new, y], strict=True):
        torch.testing.assert_close(a, b)


ALIASES = {
    "x + 0": lambda m, x: x + 0,
    "x * 1": lambda m, x: (x * 1, x.sin()),
    "clone": lambda m, x: x.clone(),
    "two equal outputs": lambda m, x: (x * 2, x * 2),
    "a value and a copy": lambda m, x: (y := x * 2, y + 0),
    "dropout of nothing": lambda m, x: torch.nn.functional.dropout(x, 0.0, True),
    "a copied view": lambda m, x: x.transpose(1, 2).contiguous().view(-1),
    "casts there and back": lambda m, x: x.double().float(),
    "a cast with a copy": lambda m, x: x.to(torch.float32, copy=True),
}


@pytest.mark.parametrize("name", ALIASES)
def test_outputs_alias_what_they_did(name: str):
    program = capture(Written(ALIASES[name], {}), (torch.randn(2, 5, 12),), {})
    before = program.copy()
    canonicalize(program)
    x = torch.randn(3, 4, 12)

    def shared(p: Program) -> list[bool]:
        values = [x, *run(p, {}, [x])]
        places = [v.untyped_storage().data_ptr() for v in values]
        return [a == b for i, a in enumerate(places) for b in places[:i]]

    assert shared(program) == shared(before)


def test_random_operators_are_neither_merged_nor_moved():
    def function(m, x):
        drop = torch.nn.functional.dropout
        a, b = drop(x, 0.5, True), drop(x, 0.5, True)
        return b * 2 + a, drop((x @ m.w).view(-1, 12), 0.5, True).view(x.shape)

    program = canonical_of(function, w=(12, 12))
    assert ops(program).count("dropout") == 3


def test_a_dropout_that_is_rebuilt_draws_once():
    def function(m, x):
        y = x.transpose(0, 1).reshape(-1, 12)
        y = torch.nn.functional.dropout(torch.nn.functional.linear(y, m.w), 0.5, True)
        return y.view(x.shape[1], x.shape[0], 12) + torch.nn.functional.dropout(x.transpose(0, 1), 0.5, True)

    assert ops(canonical_of(function, w=(12, 12))).count("dropout") == 2


def test_regions_are_not_combined():
    def function(m, x):
        with torch.no_grad():
            scale = torch.sigmoid(x)
        return x * scale + x * torch.sigmoid(x)

    program = canonical_of(function)
    assert ops(program).count("sigmoid") == 1
    assert ops(program).count("silu") == 1


def test_regions_stay_in_one_piece():
    def function(m, x):
        with torch.no_grad():
            a, b = x.sin() + m.w, x.cos() * m.w
        return b.exp() * a + x

    program = canonical_of(function, w=(12,))
    inside = ["grad" in line.regions for _, line in lines(program)]
    assert "".join("1" if i else "0" for i in inside).strip("0").count("0") == 0
    assert inside.count(True) == 4


def test_autocast_keeps_its_casts():
    def function(m, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = torch.nn.functional.linear(x, m.w) + m.b
            return y.softmax(-1), x.exp() / x.exp().sum(-1, keepdim=True)

    before = capture(Written(function, {"w": (12, 12), "b": (12,)}), (torch.randn(2, 5, 12),), {})
    after = before.copy()
    canonicalize(after)
    assert [
        n.meta["val"].dtype for n in after.graph.nodes if n.op == "call_function" and "linear" in n.name
    ] == [torch.bfloat16]
    state, x = state_of(before, Written(function, {"w": (12, 12), "b": (12,)})), torch.randn(3, 4, 12)
    for a, b in zip(run(before, state, [x]), run(after, state, [x]), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def _half_norm(m, x):
    f = x.float()
    return m.w * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_casts_of_a_norm(dtype: torch.dtype):
    module = Written(_half_norm, {"w": (12,)}, dtype)
    program = check(module, [torch.randn(2, 5, 12).to(dtype)])
    want = ["rms_norm"] if dtype is torch.float32 else ["to.dtype", "rms_norm", "to.dtype", "mul.Tensor"]
    assert ops(program) == want


@pytest.mark.parametrize(
    ("dtype", "ops_"), [(torch.float16, ["mul.Tensor", "matmul"]), (torch.bfloat16, ["matmul", "mul.Tensor"])]
)
def test_scales_in_half_precision(dtype: torch.dtype, ops_: list[str]):
    """In float16 the product of unscaled operands could overflow, in bfloat16 it cannot."""
    q, k = torch.randn(2, 3, 5, 4).to(dtype), torch.randn(2, 3, 4, 5).to(dtype)
    program = capture(Written(lambda m, q, k: (q * 0.3) @ k, {}), (q, k), {})
    canonicalize(program)
    assert ops(program) == ops_


def test_casts_that_lose_stay():
    program = canonical_of(lambda m, x: (x.half().float(), x.double().float(), x.double().half()))
    assert sorted(str(line.args) for _, line in lines(program)) == [
        "%inputs, f16", "%inputs, f64", "%to, f32", "%to_2, f32",
    ]  # fmt: skip


def test_rounding_before_an_integer_stays():
    """A division whose result is truncated keeps its last bit."""
    program = canonical_of(lambda m, x: (x.exp().log() / 2.0794 * 16).long())
    assert ops(program) == ["exp", "log", "div.Tensor", "mul.Tensor", "to.dtype"]


def test_training_keeps_its_effects():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(inplace=True))
    before = capture(module, (torch.randn(2, 3, 5, 6),), {})
    after = before.copy()
    canonicalize(after)
    x = torch.randn(2, 3, 5, 6)
    states = []
    for program in (before, after):
        state = {k: v.detach().clone() for k, v in state_of(program, module).items()}
        torch.manual_seed(3)
        states.append([*run(program, state, [x]), *state.values()])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b)


def test_detach_stays_where_gradients_flow():
    program = canonical_of(lambda m, x: x * m.w.detach() + m.b.long().detach(), w=(12,), b=(12,))
    assert ops(program).count("detach") == 1


def test_the_form_does_not_depend_on_names_or_time():
    def one(m, x):
        a, b = torch.sin(x), torch.cos(x)
        return a * b + m.w

    def other(m, zebra):
        apple = torch.cos(zebra)
        return m.w + apple * torch.sin(zebra)

    first, second = (text(canonical_of(f, w=(12,))) for f in (one, other))
    assert first.replace("inputs", "x") == second.replace("inputs", "x")


def test_every_step_is_told():
    told = dict(steps())
    assert len(told) > 60
    assert all(sentence.endswith((".", ";")) or ";" in sentence for sentence in told.values())


def test_time_is_linear():
    """Ten times the layers take about ten times as long."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    seconds = []
    for depth in (4, 40):
        model = nn.Sequential(*(copy.deepcopy(layer) for _ in range(depth)))
        program = capture(model, (torch.randn(2, 5, 8),), {})
        start = time.process_time()
        canonicalize(program)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 25 * max(seconds[0], 0.02)
