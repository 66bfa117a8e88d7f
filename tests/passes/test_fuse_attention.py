"""fuse-attention: what it rewrites, what it leaves alone and why, and that values survive."""

import math
import re

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fxaccel
from fxaccel.emit import emit
from fxaccel.kernels import attention as kernel
from fxaccel.listing import listing
from fxaccel.passes import FuseAttention

F = nn.functional
Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 8)
GROUPED = torch.randn(2, 2, 7, 8)
MASK = torch.rand(5, 7) > 0.3


class Call(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, *args):
        return self.function(self, *args)


def written(scale, dim=-1, dtype=None):
    def attention(self, q, k, v):
        scores = q @ k.transpose(-2, -1)
        scores = scores if scale is None else scores * scale
        return scores.softmax(dim, dtype=dtype).to(q.dtype) @ v

    return attention


def sdpa(**options):
    return lambda self, q, k, v, mask=None: F.scaled_dot_product_attention(q, k, v, mask, **options)


def texts(fast):
    one = fast.__dict__["_fxaccel"].all[0]
    return [
        [" ".join(line.split("#")[0].split()) for line in listing(p).splitlines()]
        for p in (one.canonical, one.program)
    ]


def accelerated(function, *args):
    return fxaccel.accelerate(Call(function), passes=["fuse-attention"], example_inputs=args)


# -- it fires --------------------------------------------------------------------------------------


def test_the_written_out_core_becomes_one_kernel():
    before, after = texts(accelerated(written(0.25), Q, K, V))
    assert [line.split(" = ")[1].split("(")[0] for line in before] == [
        "aten.permute", "aten.matmul", "aten.mul.Tensor", "aten.softmax.int", "aten.matmul"
    ]  # fmt: skip
    assert "fxaccel.attention(" in after[-2]
    assert after[-2].endswith("[], '', '', 0.25)")
    assert "aten.clone(" in after[-1]  # the caller is given rows side by side as from a product
    assert not any("softmax" in line for line in after)


def test_scaled_dot_product_attention_becomes_the_kernel_with_its_scale_written_out():
    fast = accelerated(sdpa(), Q, K, V)
    (line,) = texts(fast)[1]
    assert f"fxaccel.attention(%args, %arg1, %arg2, [], '', '', {1 / math.sqrt(8)})" in line


FIRES = {
    "causal": (sdpa(is_causal=True), (Q, K, V)),
    "a boolean mask": (sdpa(), (Q, K, V, MASK)),
    "a float mask": (sdpa(), (Q, K, V, torch.randn(5, 7))),
    "a mask a head": (sdpa(), (Q, K, V, torch.randn(1, 4, 5, 7))),
    "a mask a key": (sdpa(), (Q, K, V, MASK[:1])),
    "a float mask a batch": (sdpa(), (Q, K, V, torch.randn(2, 1, 1, 7))),
    "a scale": (sdpa(scale=0.1), (Q, K, V)),
    "grouped heads": (sdpa(enable_gqa=True), (Q, GROUPED, GROUPED)),
    "three dimensions": (lambda s, *a: F.scaled_dot_product_attention(*(t[0] for t in a)), (Q, K, V)),
    "five dimensions": (sdpa(), (Q[None], K[None], V[None], torch.zeros(5, 7))),
    "a tensor for a scale": (lambda s, q, k, v: (q @ k.mT * s.scale).softmax(-1) @ v, (Q, K, V)),
    "written, unscaled": (written(None), (Q, K, V)),
    "written, scaled": (written(0.125), (Q, K, V)),
    "written, softmax in float32": (
        written(0.5, dtype=torch.float32),
        (Q.bfloat16(), K.bfloat16(), V.bfloat16()),
    ),
    "values of another size": (sdpa(), (Q, K, torch.randn(2, 4, 7, 3))),
}


@pytest.mark.parametrize("name", FIRES)
def test_every_form_fires_and_values_and_gradients_agree(name):
    function, args = FIRES[name]
    model, results = Call(function), []
    fast = fxaccel.accelerate(model, passes=["fuse-attention"])
    for m in (model, fast):
        leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
        out = m(*leaves)
        out.float().square().sum().backward()
        results.append([out.detach(), *(a.grad for a in leaves if a.is_floating_point())])
    for got, want in zip(*reversed(results), strict=True):
        eps = torch.finfo(want.dtype).eps
        torch.testing.assert_close(got, want, rtol=64 * eps, atol=16 * eps * float(want.abs().max()))
    assert len(fast.report()["fuse-attention"].applied) == 1, fast.report()


def test_other_sizes_are_served():
    fast = accelerated(written(0.25), Q, K, V)
    q, k, v = torch.randn(3, 4, 9, 8), torch.randn(3, 4, 2, 8), torch.randn(3, 4, 2, 8)
    torch.testing.assert_close(fast(q, k, v), Call(written(0.25))(q, k, v))


# -- it declines -----------------------------------------------------------------------------------

DECLINED = {
    "windows that differ in number": (
        lambda s, q, k, v: F.scaled_dot_product_attention(q[:, None], k[None, :1], v[None, :1]),
        (Q, K, V),
        "the dimensions before the heads differ",
    ),
    "a head size that varies": (
        lambda s, q, k, v: F.scaled_dot_product_attention(q[None], k[None], v[None]),
        (Q[0], K[0], V[0]),
        "the scale is left to a head size that is not a number",
    ),
    "a large head": (sdpa(), (torch.randn(1, 1, 2, 300),) * 3, "D = 300 is not within 1 .. 256"),
    "a cast of the weights": (
        lambda s, q, k, v: (q @ k.mT).softmax(-1, dtype=torch.float32).to(torch.float16) @ v,
        (Q.double(), K.double(), V.half()),
        "dtypes differ: q is torch.float64, k torch.float64, v torch.float16",
    ),
}


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize("name", DECLINED)
def test_declines_and_says_why(name):
    function, args, why = DECLINED[name]
    fast = accelerated(function, *args)
    report = fast.report()["fuse-attention"]
    assert report.applied == []
    assert any(why in s.why for s in (*report.refused, *report.near_misses)), fast.report()


@pytest.mark.filterwarnings("ignore:pass")
def test_a_near_miss_says_what_would_be_taken():
    report = accelerated(lambda s, q, k, v: (q @ k.mT).softmax(-2) @ v, Q, K, V).report()["fuse-attention"]
    (miss,) = report.near_misses
    assert miss.change == "softmax(scores, -1)"


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize(
    ("name", "near"),
    {
        "softmax over the queries": written(0.5, dim=-2),
        "softmax over the heads": lambda s, q, k, v: (q @ k.mT).softmax(1) @ v,
        "weights are also returned": lambda s, q, k, v: ((p := (q @ k.mT).softmax(-1)) @ v, p),
        "log softmax": lambda s, q, k, v: (q @ k.mT).log_softmax(-1) @ v,
    }.items(),
)  # fmt: skip
def test_what_only_looks_like_attention_keeps_its_values(name, near):
    fast = accelerated(near, Q, K, V)
    torch.testing.assert_close(fast(Q, K, V), Call(near)(Q, K, V))
    assert fast.report()["fuse-attention"].error == ""
    assert fast.report()["fuse-attention"].applied == []


@pytest.mark.parametrize(
    "spelling",
    [
        lambda s, q, k, v: (q @ k.mT.flip(-1) * 0.5).softmax(-1) @ v,  # other keys, in their own order
        lambda s, q, k, v: ((q @ k.mT).softmax(-1) * 0.5) @ v,  # the scale belongs to the values
        lambda s, q, k, v: (q * 2 @ k.mT / 3).softmax(-1) @ v,
    ],
)
def test_unusual_attention_is_still_attention(spelling):
    fast = accelerated(spelling, Q, K, V)
    torch.testing.assert_close(fast(Q, K, V), Call(spelling)(Q, K, V))
    assert len(fast.report()["fuse-attention"].applied) == 1


def test_inductors_wrong_rewrite_of_a_permuted_key_is_not_ours():
    """softmax(q @ k.permute(0,2,3,1)/4) @ v: torch 2.13's own pattern computes attention on another k."""

    def near(self, q, k, v):
        return (q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / 4).softmax(-1) @ v.transpose(1, 2)

    args = (Q[:, :, :4], torch.randn(2, 4, 4, 8), torch.randn(2, 4, 4, 8))
    fast = accelerated(near, *args)
    torch.testing.assert_close(fast(*args), Call(near)(*args))


@pytest.mark.parametrize("value", [-math.inf, torch.finfo(torch.float32).min], ids=["inf", "finfo"])
def test_rows_that_see_no_key(value):
    bias = torch.zeros(5, 7)
    bias[2] = value
    model = Call(sdpa())
    fast = fxaccel.accelerate(model, passes=["fuse-attention"])
    torch.testing.assert_close(fast(Q, K, V, bias), model(Q, K, V, bias), equal_nan=True)


# -- a second run finds nothing --------------------------------------------------------------------


def test_a_second_run_finds_nothing():
    from fxaccel import manager

    fast = accelerated(written(0.25), Q, K, V)
    run = manager.run(fast.__dict__["_fxaccel"].all[0].program, [FuseAttention()])
    (record,) = run.report.passes
    assert (record.applied, record.refused, record.error) == ([], [], "")


def test_on_a_gpu_the_faster_of_two_is_called_and_the_report_says_which():
    """The graph is made to say CUDA; the calls are on the CPU."""
    model = Call(sdpa(is_causal=True))
    fast = fxaccel.accelerate(model, passes=["fuse-attention"], check=False)
    fast(Q, K, V)
    (one,) = fast.__dict__["_fxaccel"].all
    with FakeTensorMode():
        for node in one.program.graph.find_nodes(op="call_function", target=kernel.op):
            node.meta["val"] = torch.empty(node.meta["val"].shape, device="cuda")
    one.code = emit(one.program)
    one.bind(fast, 0, "python")
    choice = one.code.choices["fxaccel.attention.default"]
    for clock, best in (([2.0, 1.0], "SDPA"), ([1.0, 2.0], "fxaccel")):
        choice.timer = lambda runs, times=clock: [(run(), t)[1] for run, t in zip(runs, times, strict=True)]
        choice.chosen.clear()
        torch.testing.assert_close(fast(Q, K, V), model(Q, K, V))
        (note,) = fast.report().captures[0].notes
        assert re.fullmatch(rf"attention \[.*\] float32, k <= q, .*: {best} 1 ms; \w+ 2 ms", note), note
    assert note in str(fast.report())


class Layers(nn.Module):
    """Three attentions under one padding mask; a checkpoint around each of the last two if asked for."""

    def __init__(self, checkpointed):
        super().__init__()
        self.checkpointed = checkpointed

    def forward(self, x, keep):
        def layer(x):
            scores = (x @ x.mT).masked_fill(~keep[:, None, None, :], torch.finfo(x.dtype).min)
            return scores.softmax(-1) @ x

        x = layer(x)
        for _ in range(2):
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


@pytest.mark.parametrize("checkpointed", [False, True])
def test_small_attentions_on_the_cpu_share_one_mask_in_each_function(checkpointed):
    keep = torch.rand(2, 7) > 0.3
    keep[:, 0] = True
    model, x = Layers(checkpointed), torch.randn(2, 2, 7, 4, dtype=torch.float64, requires_grad=True)
    fast = fxaccel.accelerate(model, passes=["fuse-attention"], example_inputs=(x, keep))
    assert len(fast.report()["fuse-attention"].applied) == 3
    assert fast.code.count("= small(") == (3 if checkpointed else 1)
    assert fast.code.count("shared=") == 3
    hidden = keep.clone()
    hidden[1] = False  # no key is left: the mask is not shared then, and the operator is called
    long = (
        torch.randn_like(x[:1, :1]).repeat(1, 1, 43, 1).requires_grad_(),
        torch.rand(1, 301) > 0.3,
    )  # not small
    for given, mask in ((x, keep), (x, hidden), long):
        results = []
        for m in (model, fast):
            y = m(given, mask)
            results.append([y, *torch.autograd.grad(y.square().sum(), given)])
        torch.testing.assert_close(*results)
