"""Every operator that emitted code calls under a name of torch's own."""

import pytest
import torch
from torch import nn

from fxaccel import emit
from tests.test_emit import emitted

F = nn.functional
aten = torch.ops.aten


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
    emitter = emit.Emitter.__new__(emit.Emitter)
    emitter.constants, emitter.taken, emitter.everywhere = {}, set(), set()
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
