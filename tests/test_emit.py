"""The generated code: what it accepts, that it frees what it is done with, that its bindings are right."""

import gc
import re
import traceback
import weakref

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import emit
from fxaccel.capture import capture
from fxaccel.errors import CaptureError

F = nn.functional
aten = torch.ops.aten


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        return x + self.inner(x)


def emitted(function, *args):
    """(accepts, forward) of a function captured on args."""
    program = capture(function if isinstance(function, nn.Module) else Function(function), args, {})
    names = emit.emit(program).bind(nn.Module(), "<test>")
    return names["accepts"], names["forward"]


# -- what a call must be ---------------------------------------------------------------------------


def test_accepts_other_sizes_of_symbolic_dimensions_and_nothing_else():
    x = torch.randn(4, 6)
    accepts, _ = emitted(lambda a: a @ a.t(), x)
    assert accepts(x)
    assert accepts(torch.randn(9, 6))
    assert not accepts(x.double())
    assert not accepts(x[0])
    assert not accepts(x[None])
    assert not accepts(torch.randn(6, 4).t())
    assert not accepts(x.to("meta"))
    assert not accepts(torch.randn(1, 6))  # a size of one broadcasts: another graph


def test_a_wrong_shape_of_the_same_number_of_elements_is_never_computed():
    model = Net()
    fast = fxaccel.accelerate(model, example_inputs=(torch.randn(4, 8),))
    for wrong in (torch.randn(8, 4), torch.randn(2, 16), torch.randn(32)):
        with pytest.raises((RuntimeError, CaptureError)):
            model(wrong)
        with pytest.raises((RuntimeError, CaptureError)):
            fast(wrong)


def test_a_size_that_the_model_fixes_is_checked():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(6, 3))

        def forward(self, x):
            return x.view(-1, 6, 3) + self.position

    model = Fixed()
    fast = fxaccel.accelerate(model, example_inputs=(torch.randn(4, 6, 3),))
    wrong = torch.randn(6, 4, 3)  # as many elements; the view would swallow it in eager, too
    torch.testing.assert_close(fast(wrong), model(wrong))
    with pytest.raises((RuntimeError, CaptureError)):
        fast(torch.randn(4, 5, 3)[:, :, :2])


def test_two_inputs_that_share_a_size_must_agree():
    accepts, _ = emitted(lambda a, b: a + b, torch.randn(4, 6), torch.randn(4, 6))
    assert accepts(torch.randn(5, 7), torch.randn(5, 7))
    assert not accepts(torch.randn(5, 7), torch.randn(4, 7))
    assert not accepts(torch.randn(5, 7), torch.randn(5, 1))


def test_another_dtype_or_layout_is_captured_anew_and_computed_right():
    model = Net().double()
    fast = fxaccel.accelerate(model)
    x = torch.randn(8, 8, dtype=torch.float64)
    for given in (x, x.t(), x[::2], x[:, :, None].expand(8, 8, 2)[:, :, 0]):
        torch.testing.assert_close(fast(given), model(given))
    with pytest.raises((RuntimeError, CaptureError)):
        fast(x.float())


def test_an_index_out_of_range_raises():
    model = nn.Embedding(10, 4)
    fast = fxaccel.accelerate(model, example_inputs=(torch.tensor([[1, 2], [3, 4]]),))
    with pytest.raises(IndexError):
        fast(torch.tensor([[1, 2], [3, 10]]))


def test_the_check_costs_microseconds():
    import timeit

    x = torch.randn(4, 8)
    accepts, _ = emitted(lambda a: a * 2, x)
    each = min(timeit.repeat(lambda: accepts(x), number=1000, repeat=5)) / 1000
    assert each < 100e-6  # about 2 us on an idle machine


# -- the text --------------------------------------------------------------------------------------


def test_the_code_is_flat_and_names_module_and_line_of_each_statement():
    fast = fxaccel.accelerate(Net(), passes=[], example_inputs=(torch.randn(4, 8),))
    body = fast.code.split("def forward")[1]
    assert re.search(r"= linear\(.*\).*# inner\.0  ", body)
    assert "for " not in body
    assert "test_emit.py:" in body
    compile(fast.code.split("\n", 1)[1], "<code>", "exec")


def test_an_error_at_run_time_shows_the_generated_line_with_path_and_users_line():
    fast = fxaccel.accelerate(nn.Sequential(nn.Embedding(4, 2), nn.ReLU()), passes=[])
    fast(torch.tensor([[1, 2], [0, 3]]))
    try:
        fast(torch.tensor([[1, 9], [0, 3]]))
    except IndexError as error:
        text = "".join(traceback.format_exception(error))
    assert "embedding(" in text
    assert re.search(r"embedding\(.*# 0", text)


def test_two_models_of_one_class_show_each_its_own_lines():
    shown = []
    for function in (torch.sin, torch.cos):
        fast = fxaccel.accelerate(Function(lambda a, f=function: f(a) @ a), passes=[], check=False)
        fast(torch.randn(4, 4, requires_grad=True))
        capture = fast.__dict__["_fxaccel"].all[0]
        try:
            capture.forward(torch.randn(4, 3))
        except RuntimeError as error:
            shown.append("".join(traceback.format_exception(error)))
    assert [re.findall(r"matmul\((sin|cos)", t) for t in shown] == [["sin"], ["cos"]]


def test_names_that_are_keywords_or_shadow_others_are_made_different():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("lambda", nn.Parameter(torch.ones(2)))
            self.torch = nn.Linear(2, 2)
            self.forward_ = nn.ModuleDict({"class": nn.Linear(2, 2), "my-layer": nn.Linear(2, 2)})

        def forward(self, linear, torch):
            x = self.torch(linear) * getattr(self, "lambda")
            return self.forward_["class"](x) + self.forward_["my-layer"](torch)

    model, a, b = Odd(), torch.randn(3, 2), torch.randn(3, 2)
    torch.testing.assert_close(fxaccel.accelerate(model)(a, b), model(a, b))


def test_literals_survive():
    x = torch.randn(3, 4)

    def function(a):
        b = torch.where(a > 0, a, float("-inf")).clamp(min=-1e30)
        c = torch.full((2,), float("nan")).nan_to_num(1.5)
        return (
            b.to(torch.float64).sum((0, 1), keepdim=True),
            a[..., 1::2],
            c,
            a.new_zeros(2, dtype=torch.int8),
        )

    want = function(x)
    _, forward = emitted(function, x)
    for a, b in zip(forward(x), want, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


# -- freed values ----------------------------------------------------------------------------------


def test_intermediate_values_are_freed_after_their_last_reader():
    alive = weakref.WeakSet()
    most = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                alive.add(out)
                most.append(len(alive))
            return out

    def chain(a):
        for _ in range(20):
            a = a.sin()
        return a

    x = torch.randn(3, 4)
    _, forward = emitted(chain, x)
    gc.collect()
    with torch.no_grad(), Watch():
        forward(x)
    assert max(most) <= 3


def test_what_is_returned_or_read_again_is_not_freed():
    def function(a):
        b = a.sin()
        c = b.cos()
        return b, c + b, [c]

    x = torch.randn(3, 4)
    _, forward = emitted(function, x)
    got = forward(x)
    assert torch.equal(got[0], x.sin())
    assert torch.equal(got[2], x.sin().cos())


# -- bindings --------------------------------------------------------------------------------------

X, Y = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
INDEX, B = torch.randint(0, 3, (2, 3, 4)), torch.rand(2, 3, 4) > 0.5
M, W = torch.randn(4, 4), torch.randn(5, 4)
IMAGE, KERNEL = torch.randn(2, 3, 6, 6), torch.randn(4, 3, 3, 3)
# Arguments in the order of the schema, for every name in emit._BOUND.
EXAMPLES = {
    "abs": (X,),
    "add.Tensor": (X, Y),
    "add.Scalar": (X, 2),
    "addmm": (torch.randn(4), M, M),
    "all": (B,),
    "all.dim": (B, 1, True),
    "amax": (X, [1], True),
    "amin": (X, [1], True),
    "any": (B,),
    "any.dim": (B, 1),
    "arange": (5,),
    "argmax": (X, 1, True),
    "baddbmm": (torch.randn(2, 3, 3), X, X.mT),
    "bitwise_and.Tensor": (INDEX, INDEX + 1),
    "bitwise_not": (INDEX,),
    "bitwise_or.Tensor": (INDEX, INDEX + 1),
    "bmm": (X, X.mT),
    "cat": ([X, Y], 1),
    "ceil": (X,),
    "chunk": (X, 2, 2),
    "clamp": (X, -0.5, 0.5),
    "clone": (X,),
    "conv1d": (X, torch.randn(2, 3, 2), torch.randn(2), [1], [1], [2], 1),
    "conv2d": (IMAGE, KERNEL, None, [2, 1], [1, 0], [1, 1], 1),
    "conv3d": (torch.randn(1, 2, 4, 4, 4), torch.randn(3, 2, 2, 2, 2), None, [1, 2, 1]),
    "cos": (X,),
    "cumsum": (X, 1),
    "detach": (X,),
    "div.Tensor": (X, Y),
    "dropout": (X, 0.0, True),
    "embedding": (W, torch.tensor([[1, 2]]), -1, False, False),
    "eq.Tensor": (INDEX, INDEX),
    "eq.Scalar": (INDEX, 1),
    "erf": (X,),
    "exp": (X,),
    "exp2": (X,),
    "flatten.using_ints": (X, 1, 2),
    "full": ([2, 3], 1.5),
    "ge.Tensor": (X, Y),
    "ge.Scalar": (X, 0),
    "gt.Tensor": (X, Y),
    "gt.Scalar": (X, 0),
    "index_select": (X, 1, torch.tensor([2, 0])),
    "isinf": (X,),
    "isnan": (X,),
    "layer_norm": (X, [4], torch.randn(4), torch.randn(4), 1e-3, False),
    "le.Tensor": (X, Y),
    "le.Scalar": (X, 0),
    "log": (X.abs(),),
    "log_softmax.int": (X, 1),
    "logical_and": (B, ~B),
    "logical_not": (B,),
    "logical_or": (B, ~B),
    "lt.Tensor": (X, Y),
    "lt.Scalar": (X, 0),
    "masked_fill.Scalar": (X, B, -1.0),
    "masked_fill.Tensor": (X, B, torch.tensor(2.0)),
    "matmul": (X, M),
    "max_pool2d": (IMAGE, [2, 2], [1, 2], [1, 0], [1, 1], True),
    "mean": (X,),
    "mean.dim": (X, [1], True),
    "min": (X,),
    "max": (X,),
    "max.dim": (X, 1, True),
    "min.dim": (X, 1, True),
    "mm": (M, M),
    "mul.Tensor": (X, Y),
    "mul.Scalar": (X, 3),
    "ne.Tensor": (INDEX, INDEX + 1),
    "ne.Scalar": (INDEX, 1),
    "neg": (X,),
    "ones": ([2, 3],),
    "permute": (X, [2, 0, 1]),
    "pow.Tensor_Scalar": (X, 3),
    "pow.Tensor_Tensor": (X.abs(), Y),
    "pow.Scalar": (2, Y),
    "prod": (X,),
    "prod.dim_int": (X, 1, True),
    "reciprocal": (X,),
    "relu": (X,),
    "rms_norm": (X, [4], torch.randn(4), 1e-3),
    "round": (X,),
    "rsqrt": (X.abs(),),
    "rsub.Tensor": (X, Y),
    "rsub.Scalar": (X, 2),
    "scalar_tensor": (2.5,),
    "sigmoid": (X,),
    "sin": (X,),
    "softmax.int": (X, 1),
    "split.Tensor": (X, 2, 2),
    "sqrt": (X.abs(),),
    "square": (X,),
    "squeeze": (X[:, :1],),
    "squeeze.dim": (X[:, :1], 1),
    "stack": ([X, Y], 1),
    "sub.Tensor": (X, Y),
    "sub.Scalar": (X, 2),
    "sum": (X,),
    "sum.dim_IntList": (X, [1], True),
    "tanh": (X,),
    "transpose.int": (X, 0, 2),
    "tril": (X, 1),
    "triu": (X, 1),
    "unbind.int": (X, 1),
    "unsqueeze": (X, 1),
    "where.self": (B, X, Y),
    "zeros": ([2, 3],),
    "zeros_like": (X,),
    "ones_like": (X,),
    "full_like": (X, 2.5),
    "gelu": (X,),
    "linear": (X, W, torch.randn(5)),
    "scaled_dot_product_attention": (IMAGE, IMAGE, IMAGE, None, 0.0, True),
    "silu": (X,),
    "softplus": (X, 2.0, 1.0),
    "leaky_relu": (X, 0.2),
    "hardswish": (X,),
    "avg_pool2d": (IMAGE, [2, 2], [1, 2], [1, 0], True, False, 3),
    "adaptive_avg_pool2d": (IMAGE, [2, 3]),
    "pad": (X, [1, 2], "constant", 3.0),
    "contiguous": (X.mT,),
    "expand": (X[:, :1], [2, 5, 4]),
    "repeat": (X, [1, 2, 1]),
    "reshape": (X, [6, 4]),
    "to.dtype": (X, torch.float64),
    "to.device": (X, torch.device("cpu"), torch.float64),
    "type_as": (X, INDEX),
    "view": (X, [6, 4]),
    "arange.start": (1, 5),
    "arange.start_step": (1, 9, 2),
}


def test_every_bound_name_that_exists_has_an_example():
    assert set(emit._BINDINGS) <= {name.partition(".")[0] for name in EXAMPLES}
    words = {w.partition(":")[0] for w in emit._BOUND.split()}
    assert words - set(emit._BINDINGS) == set(), "a name in _BOUND has no binding in this torch"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_binding_computes_what_its_operator_does(name):
    packet, _, overload = name.partition(".")
    target = getattr(getattr(aten, packet), overload or "default")
    args = EXAMPLES[name]
    want = target(*args)
    graph = torch.fx.Graph()
    node = graph.call_function(target, args)
    emitter = emit._Emitter.__new__(emit._Emitter)
    emitter.constants, emitter.taken = {}, set()
    called = emitter.constants[emitter.operator(node)]
    got = called(*args)
    if not isinstance(want, (tuple, list)):
        want, got = [want], [got]
    for a, b in zip(want, got, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "function",
    [
        lambda a: torch.add(a, a, alpha=3),
        lambda a: F.gelu(a, approximate="tanh"),
        lambda a: a.softmax(-1, dtype=torch.float64),
        lambda a: a.sum(dtype=torch.float64),
        lambda a: a.mean((0, 1), keepdim=True, dtype=torch.float64),
        lambda a: a.to(torch.float16, copy=True),
        lambda a: a.to("cpu", torch.float64, False, True),
        lambda a: a.clone(memory_format=torch.contiguous_format),
        lambda a: torch.arange(a.shape[0], dtype=torch.float32),
        lambda a: torch.arange(2, a.shape[0] + 5, 2, device=a.device),
        lambda a: torch.full((a.shape[0], 2), 3, dtype=torch.int32),
        lambda a: torch.zeros(a.shape, dtype=torch.bool),
        lambda a: a.prod(1, keepdim=True),
        lambda a: a.std(0, unbiased=False),
        lambda a: torch.einsum("ij,kj->ik", a, a),
        lambda a: a.cumsum(0, dtype=torch.float64),
        lambda a: torch.addmm(a[0], a, a.t() @ a, beta=0.5, alpha=2),
        lambda a: F.scaled_dot_product_attention(a[None, None], a[None, None], a[None, None], scale=0.3),
        lambda a: a.max(0).indices,
        lambda a: a.all() | a.any(1),
        lambda a: torch.where(a > 0, 1, 0),
        lambda a: a.clamp(max=0.1),
        lambda a: torch.div(a, 0.3, rounding_mode="floor"),
        lambda a: a.round(decimals=1),
    ],
)
def test_keywords_and_other_overloads_reach_their_operator(function):
    x = torch.randn(5, 4)
    want = function(x)
    _, forward = emitted(function, x)
    (got,) = forward(x)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert torch.equal(got, want)


# -- backends --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 9])
def test_size_arithmetic_is_emitted(size):
    def function(a):
        b = a.view(a.shape[0] * 2, a.shape[1] // 2)
        return b, b.new_ones(b.shape[0] - 1, (a.shape[0] + 3) % 4 + 1), a.shape[0] / 2, -a.shape[0]

    _, forward = emitted(function, torch.randn(6, 4))
    x = torch.randn(size, 4)
    for a, b in zip(forward(x), function(x), strict=True):
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b))
