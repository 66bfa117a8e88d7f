"""fuse-norm: what it rewrites, what it leaves alone and why, and that values survive."""

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.listing import listing
from fxaccel.passes import FuseNorm

F = nn.functional


class PreNorm(nn.Module):
    """A residual add, a norm, and the sum carried on."""

    def __init__(self, norm, d=8):
        super().__init__()
        self.norm, self.proj = norm, nn.Linear(d, d, bias=False)

    def forward(self, x, r):
        h = x + r
        return h + self.proj(self.norm(h))


class Llama(nn.Module):
    def __init__(self, d=8, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.randn(d)), eps

    def forward(self, x):
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class Gemma(Llama):
    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class WrittenLayerNorm(Llama):
    def forward(self, x):
        c = x - x.mean(-1, keepdim=True)
        return c / torch.sqrt(c.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Bare(nn.Module):
    def forward(self, x):
        return F.rms_norm(x, [8], eps=1e-5)


def texts(fast):
    """The graph before and after, one list of operators with their arguments each."""
    one = fast.__dict__["_fxaccel"].all[0]
    return [
        [" ".join(line.split("#")[0].split()) for line in listing(p).splitlines()]
        for p in (one.canonical, one.program)
    ]


def accelerated(model, *args):
    return fxaccel.accelerate(model, passes=["fuse-norm"], example_inputs=args)


# -- it fires --------------------------------------------------------------------------------------


def test_a_residual_add_and_its_norm_become_one_kernel_that_also_returns_the_sum():
    x, r = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    before, after = texts(accelerated(PreNorm(nn.RMSNorm(8, eps=1e-6)), x, r))
    assert before == [
        "%add = aten.add.Tensor(%x, %r)",
        "%rms_norm = aten.rms_norm(%add, [8], %p_norm_weight, 1e-06)",
        "%linear = aten.linear(%rms_norm, %p_proj_weight)",
        "%add_1 = aten.add.Tensor(%add, %linear)",
    ]
    assert after == [
        "%rms_norm, %add = fxaccel.add_rms_norm(%x, %r, %p_norm_weight, 1e-06)",
        "%linear = aten.linear(%rms_norm, %p_proj_weight)",
        "%add_1 = aten.add.Tensor(%add, %linear)",
    ]


def test_layer_norm_after_an_add():
    x, r = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    _, after = texts(accelerated(PreNorm(nn.LayerNorm(8)), x, r))
    assert (
        after[0] == "%layer_norm, %add = fxaccel.add_layer_norm(%x, %r, %p_norm_weight, %p_norm_bias, 1e-05)"
    )


@pytest.mark.parametrize(
    ("norm", "dtype", "line"),
    [
        (nn.RMSNorm(8, eps=1e-6), torch.float32, "fxaccel.rms_norm(%x, %p_weight, 1e-06)"),
        (Bare(), torch.float32, "fxaccel.rms_norm(%x, None, 1e-05)"),
        (nn.LayerNorm(8), torch.float32, "fxaccel.layer_norm(%x, %p_weight, %p_bias, 1e-05)"),
        (nn.LayerNorm(8, bias=False), torch.bfloat16, "fxaccel.layer_norm(%x, %p_weight, None, 1e-05)"),
        (
            nn.LayerNorm(8, elementwise_affine=False),
            torch.float32,
            "fxaccel.layer_norm(%x, None, None, 1e-05)",
        ),
        (WrittenLayerNorm(), torch.float32, "fxaccel.layer_norm(%x, %p_weight, None, 1e-06)"),
        (Llama(), torch.float32, "fxaccel.rms_norm(%x, %p_weight, 1e-06)"),
        (Llama(), torch.bfloat16, "fxaccel.rms_norm(%x, %p_weight, 1e-06, 0.0, True)"),
        (Gemma(), torch.float32, "fxaccel.rms_norm(%x, %p_weight, 1e-06, 1.0)"),
        (Gemma(), torch.bfloat16, "fxaccel.rms_norm(%x, %p_weight, 1e-06, 1.0)"),
    ],
    ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else str(v).split("(")[0],
)
def test_every_norm_becomes_its_kernel(norm, dtype, line):
    fast = accelerated(norm.to(dtype), torch.randn(2, 3, 8, dtype=dtype))
    assert [after.split(" = ")[1].replace("%input_1", "%x") for after in texts(fast)[1]] == [line]
    assert len(fast.report()["fuse-norm"].applied) == 1


# -- it declines -----------------------------------------------------------------------------------


class Call(nn.Module):
    """A function of x and three tensors of its own."""

    def __init__(self, function, shape=(8,), dtype=torch.float32):
        super().__init__()
        self.w, self.b, self.other = (nn.Parameter(torch.randn(shape, dtype=dtype)) for _ in range(3))
        self.function = function

    def forward(self, x, r=None):
        return self.function(self, x, r)


X = torch.randn(2, 3, 8)
DECLINED = [
    (
        Call(lambda s, x, r: F.rms_norm(x, [3, 8], eps=1e-5)),
        (X,),
        "it normalises over [3, 8]; the kernel takes the last dimension, 8",
    ),
    (Call(lambda s, x, r: F.layer_norm(x, [3, 8])), (X,), "it normalises over [3, 8]"),
    (
        Call(lambda s, x, r: F.rms_norm(x, [8], s.w)),
        (X,),
        "eps is left to the dtype; the kernel needs a number",
    ),
    (
        Call(lambda s, x, r: F.rms_norm(x, [8], s.w + s.other, 1e-5)),
        (X,),
        "the weight is shifted by a tensor; the kernel takes a number",
    ),
    (
        Call(
            lambda s, x, r: s.w * F.rms_norm(x.float(), [8], None, 1e-5).to(torch.float16),
            dtype=torch.float16,
        ),
        (X.bfloat16(),),
        "the result is torch.float16, the input is torch.bfloat16",
    ),
    (
        Call(lambda s, x, r: s.w * F.rms_norm(x.double(), [8], None, 1e-5).to(x.dtype)),
        (X,),
        "the statistics are torch.float64, those of the kernel torch.float32",
    ),
    (
        Call(lambda s, x, r: F.rms_norm(x + 1.5, [8], s.w, 1e-5)),
        (X,),
        "the addend is a number, not a residual tensor",
    ),
    (
        Call(lambda s, x, r: F.layer_norm(x + 1.5, [8], s.w, s.b)),
        (X,),
        "the addend is a number, not a residual tensor",
    ),
    (Call(lambda s, x, r: F.rms_norm(x + r, [8], s.w, 1e-5)), (X, torch.randn(8)), "does not broadcast"),
    (Call(lambda s, x, r: F.layer_norm(x + r, [8], s.w, s.b)), (X, torch.randn(3, 1)), "does not broadcast"),
]


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize(("model", "args", "why"), DECLINED, ids=[str(i) for i in range(len(DECLINED))])
def test_declines_and_says_why(model, args, why):
    fast = accelerated(model, *args)
    assert any(why in s.why for s in fast.report()["fuse-norm"].refused), fast.report()
    torch.testing.assert_close(fast(*args), model(*args))


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize(
    "near",
    [
        lambda s, x, r: s.w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6 + x),
        lambda s, x, r: (
            s.w * x / (torch.sqrt(x.pow(2).mean(-1, keepdim=True)) + 1e-6)
        ),  # eps outside the root
        lambda s, x, r: s.w * x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-6),  # over the rows
        lambda s, x, r: s.w * x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
        lambda s, x, r: s.w * x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + 1e-6),
        lambda s, x, r: (
            s.w * (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6)
        ),  # unbiased
        lambda s, x, r: s.w * x * torch.rsqrt((2 * x).pow(2).mean(-1, keepdim=True) + 1e-6),
    ],
)
def test_what_only_looks_like_a_norm_keeps_its_values(near):
    model = Call(near)
    fast = accelerated(model, X)
    torch.testing.assert_close(fast(X), model(X), equal_nan=True)
    assert fast.report()["fuse-norm"].error == ""
    assert "rms_norm(" not in fast.code


# -- values agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
@pytest.mark.parametrize(
    "norm",
    [nn.RMSNorm(8, eps=1e-6), nn.LayerNorm(8), Llama(), Gemma(), WrittenLayerNorm()],
    ids=lambda n: type(n).__name__,
)
def test_values_and_gradients_agree_in_eps(norm, scale):
    model = PreNorm(norm)
    fast = fxaccel.accelerate(model, passes=["fuse-norm"])
    for shape in ((2, 3, 8), (5, 7, 8)):
        x, r = torch.randn(shape) * scale, torch.randn(shape) * scale
        x[0, 0] = r[0, 0] = 0  # a row of zeros
        results = []
        for m in (model, fast):
            a, b = x.clone().requires_grad_(), r.clone().requires_grad_()
            m.zero_grad()
            y = m(a, b)
            y.square().sum().backward()
            results.append([y.detach(), a.grad, b.grad, *(p.grad.clone() for p in m.parameters())])
        for got, want in zip(*reversed(results), strict=True):
            eps = torch.finfo(want.dtype).eps
            torch.testing.assert_close(got, want, rtol=64 * eps, atol=64 * eps * float(want.abs().max()))
    assert len(fast.report().captures) == 1
    assert fast.report()["fuse-norm"].applied


def test_the_sum_is_bit_equal():
    class Both(PreNorm):
        def forward(self, x, r):
            h = x + r
            return self.norm(h), h

    x, r = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(2, 3, 8, dtype=torch.bfloat16)
    model = Both(nn.RMSNorm(8, eps=1e-6)).bfloat16()
    fast = accelerated(model, x, r)
    assert torch.equal(fast(x, r)[1], x + r)
    assert "add_rms_norm" in texts(fast)[1][0]


# -- a second run finds nothing --------------------------------------------------------------------


def test_a_second_run_finds_nothing():
    from fxaccel import manager

    fast = accelerated(PreNorm(nn.LayerNorm(8)), torch.randn(2, 3, 8), torch.randn(2, 3, 8))
    run = manager.run(fast.__dict__["_fxaccel"].all[0].program, [FuseNorm()])
    (record,) = run.report.passes
    assert (record.applied, record.refused, record.error) == ([], [], "")
