"""fuse-rope: the spellings it finds, what it leaves alone and why, and that values survive."""

import pytest
import torch

import fxaccel
from fxaccel import manager
from fxaccel.listing import listing
from fxaccel.passes import FuseRope
from tests.helpers import Function, agree, session
from tests.zoo.torchvision_shim import importable

B, H, S, D = 2, 4, 5, 8
AT = torch.arange(S * D / 2).view(S, -1) * 0.37
COS, SIN = torch.cat([AT, AT], -1).cos(), torch.cat([AT, AT], -1).sin()
Q = torch.randn(B, H, S, D)


def halves(x):
    """Llama's rotate_half."""
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-b, a), dim=-1)


def pairs(x):
    """GPT-J's rotate_every_two."""
    return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def written(x, cos, sin):
    return x * cos + halves(x) * sin


def in_pairs(x, cos, sin):
    return x * cos + pairs(x) * sin


def unbound(x, cos, sin):
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos + torch.stack((-b, a), -1).reshape(x.shape) * sin


def in_two_parts(x, cos, sin):
    (a, b), cos, sin = x.chunk(2, -1), cos[..., : D // 2], sin[..., : D // 2]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def pairs_in_two_parts(x, cos, sin):
    a, b, cos, sin = x[..., 0::2], x[..., 1::2], cos[..., : D // 2], sin[..., : D // 2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def unbound_in_two_parts(x, cos, sin):
    x, cos, sin = x.view(*x.shape[:-1], -1, 2), cos[..., : D // 2], sin[..., : D // 2]
    a, b = x[..., 0], x[..., 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def in_place(x, cos, sin):
    y, h = torch.empty_like(x), D // 2
    y[..., :h] = x[..., :h] * cos[..., :h] - x[..., h:] * sin[..., :h]
    y[..., h:] = x[..., h:] * cos[..., :h] + x[..., :h] * sin[..., :h]
    return y


def wider(x, cos, sin):
    return written(x.double(), cos.double(), sin.double()).to(x.dtype)


def some(x, cos, sin):
    turned, rest = x[..., :6], x[..., 6:]
    return torch.cat((written(turned, cos[..., :6], sin[..., :6]), rest), -1)


def even(x, cos, sin):
    turned, rest = x.chunk(2, -1)
    return torch.cat((written(turned, cos[..., : D // 2], sin[..., : D // 2]), rest), -1)


def complex_numbers(x, cos, sin):
    angles = torch.complex(cos[..., : D // 2], sin[..., : D // 2])
    product = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2)) * angles
    return torch.view_as_real(product).flatten(-2).type_as(x)


FOUND = {  # and the arguments after cos and sin
    written: "", in_pairs: ", True", unbound: ", True", in_two_parts: ", False, True",
    pairs_in_two_parts: ", True, True", unbound_in_two_parts: ", True, True", in_place: ", False, True",
    wider: "", some: "", even: "",
}  # fmt: skip


def accelerated(function, *args, **options):
    return fxaccel.accelerate(
        Function(function), passes=["fuse-rope"], example_inputs=args, strict=True, **options
    )


def lines(program):
    text = [" ".join(line.split("#")[0].split()) for line in listing(program).splitlines()]
    return [line for line in text if "sym_size" not in line]


# -- it fires --------------------------------------------------------------------------------------


def test_queries_and_keys_are_turned_in_one_launch():
    def both(q, k, cos, sin):
        return written(q, cos, sin), written(k, cos, sin)

    fast = accelerated(both, Q, Q[:, :2], COS, SIN)
    one = session(fast).all[0]
    assert lines(one.canonical)[:6] == [
        "%getitem_1, %getitem = aten.split.Tensor(%args, 4, 3)",
        "%neg = aten.neg(%getitem)",
        "%cat = aten.cat([%neg, %getitem_1], 3)",
        "%mul = aten.mul.Tensor(%cat, %arg3)",
        "%mul_1 = aten.mul.Tensor(%args, %arg2)",
        "%add = aten.add.Tensor(%mul, %mul_1)",
    ]
    assert lines(one.program) == ["%add, %add_1 = fxaccel.rope([%args, %arg1], %arg2, %arg3)"]
    assert [s.rule for s in fast.report()["fuse-rope"].applied] == ["Rotation", "Rotation", "Together"]


@pytest.mark.parametrize("function", FOUND, ids=lambda f: f.__name__)
def test_every_spelling_is_one_kernel(function):
    fast = accelerated(function, Q, COS, SIN)
    assert len(fast.report()["fuse-rope"].applied) == 1
    (line,) = [line for line in lines(session(fast).all[0].program) if "fxaccel.rope" in line]
    assert line.endswith(f"{FOUND[function]})")
    assert line.count(",") == 2 + FOUND[function].count(",")
    agree(Function(function), fast, Q, COS, SIN)


def test_keys_that_are_turned_after_the_queries_are_read_stay_apart():
    def apart(q, k, cos, sin):
        q = written(q, cos, sin)
        return q, written(k + q[:, :2], cos, sin)

    fast = accelerated(apart, Q, Q[:, :2], COS, SIN)
    assert [s.rule for s in fast.report()["fuse-rope"].applied] == ["Rotation", "Rotation"]


def test_layers_that_share_their_angles_are_turned_each_by_itself():
    def layers(q, k, cos, sin):
        q, k = written(q, cos, sin), written(k, cos, sin)
        q, k = q.tanh() + k, q + k.tanh()
        return written(q, cos, sin), written(k, cos, sin), written(q.exp(), sin, cos)

    fast = accelerated(layers, Q, 2 * Q, COS, SIN)
    calls = [line for line in lines(session(fast).all[0].program) if "fxaccel.rope" in line]
    assert len(calls) == 3
    agree(Function(layers), fast, Q, 2 * Q, COS, SIN)


SLOW_MODELS = [pytest.param(name, marks=pytest.mark.slow) for name in ("Glm", "Phi", "Esm")]


@pytest.mark.parametrize("name", ["Llama", "GPTNeoX", "GPTJ", "Cohere", *SLOW_MODELS])
def test_models(name):
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
             "intermediate_size": 64, "max_position_embeddings": 64, "use_cache": False}  # fmt: skip
    if name == "GPTJ":
        sizes = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4}
        sizes |= {"n_positions": 64, "use_cache": False}
    if name == "Glm":
        sizes |= {"head_dim": 8, "num_key_value_heads": 2, "pad_token_id": 0}
    if name == "Esm":
        sizes |= {"position_embedding_type": "rotary", "pad_token_id": 1}
    with importable():
        import transformers

        model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    ids = {"input_ids": torch.randint(2, 50, (2, 7))}
    fast = fxaccel.accelerate(model, passes=["fuse-rope"], example_inputs=ids, strict=True)
    applied = [s.rule for s in fast.report()["fuse-rope"].applied]
    assert applied.count("Rotation") == 4
    assert applied.count("Together") == (0 if name in ("GPTJ",) else 2)


# -- it declines -----------------------------------------------------------------------------------


def first_parts(x, cos, sin):
    a, b, c = x.split(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1), c.exp()


def first_columns(x, cos, sin):
    a, b = x[..., 0:4:2], x[..., 1:4:2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


def other_rows(x, cos, sin):
    a, b = x.reshape(H, B, S, -1, 2).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)


def channels(x, cos, sin):
    a, b = x.split(2, 1)
    return x * cos + torch.cat((-b, a), 1) * sin


HALF = (COS[:, : D // 2], SIN[:, : D // 2])
DECLINED = [
    (channels, (Q, COS, SIN), "it turns along dimension 1 of 4; the kernel along the last"),
    (first_parts, (Q[..., :6], COS[:, :2], SIN[:, :2]), "it splits 6 columns at 2, not in two"),
    (first_columns, (Q[..., :6], COS[:, :2], SIN[:, :2]), "it takes columns up to 4 of 6"),
    (other_rows, (Q, *HALF), "it takes [2, 4, 5, 8] apart as [4, 2, 5, 4, 2], not as [2, 4, 5, 4, 2]"),
    (written, (Q, COS[:, :1], SIN[:, :1]), "there are angles for 1 columns, and 8 to turn"),
    (written, (Q, COS.double(), SIN.double()), "the result is torch.float64, the input torch.float32"),
    (written, (Q[:1, :1], COS.expand(1, 2, S, D), SIN), "the result is [1, 2, 5, 8], the input [1, 1, 5, 8]"),
    (written, (Q[None], COS, SIN), "x has 5 dimensions; the kernel takes 2 to 4"),
    (complex_numbers, (Q, COS, SIN), "on the CPU a product of complex numbers takes one pass already"),
]


@pytest.mark.parametrize(("function", "args", "why"), DECLINED, ids=lambda v: getattr(v, "__name__", None))
def test_declines_and_says_why(function, args, why):
    model = Function(function)
    fast = fxaccel.accelerate(model, passes=["fuse-rope"], example_inputs=args)
    report = fast.report()["fuse-rope"]
    assert not report.applied
    assert any(why in site.why for site in report.refused), report.refused
    agree(model, fast, *args)


NOT_ONE = {  # and what is told of it
    "back": (lambda x, c, s: x * c + torch.cat((x[..., 4:], -x[..., :4]), -1) * s, "neg"),
    "without a sign": (lambda x, c, s: x * c + torch.cat((x[..., 4:], x[..., :4]), -1) * s, "neg"),
    "mirrored": (lambda x, c, s: torch.cat([x[..., :4] * c[..., :4] + x[..., 4:] * s[..., :4],
                                            x[..., 4:] * c[..., :4] - x[..., :4] * s[..., :4]], -1), "where"),
    "of another": (lambda x, c, s: x.tanh() * c + halves(x) * s, "split.Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("function", NOT_ONE)
def test_what_only_looks_like_a_rotation_keeps_its_values(function):
    model, why = NOT_ONE[function]
    model = Function(model)
    fast = fxaccel.accelerate(model, passes=["fuse-rope"], example_inputs=(Q, COS, SIN))
    report = fast.report()["fuse-rope"]
    assert not report.applied
    assert [why in site.why for site in report.near_misses] == [True]
    agree(model, fast, Q, COS, SIN)


# -- values agree ----------------------------------------------------------------------------------


FLOATS = (torch.float32, torch.bfloat16, torch.float64)
EACH = [(f, d) for f in FOUND for d in FLOATS if (f, d) != (wider, torch.float64)]  # nothing is wider


@pytest.mark.parametrize(("function", "dtype"), EACH, ids=lambda v: getattr(v, "__name__", str(v)))
def test_values_and_gradients_agree_in_eps(function, dtype):
    """Two products and a sum, of which each may round where the original does: 4 eps of the terms."""
    q, cos, sin = (t.to(dtype) for t in (Q, COS, SIN))
    fast = accelerated(function, q.clone().requires_grad_(), cos, sin)
    assert len(fast.report()["fuse-rope"].applied) == 1
    weights = torch.randn(Q.shape).to(dtype)
    got, want = q.clone().requires_grad_(), q.double().requires_grad_()
    (y := fast(got, cos, sin)).backward(weights)
    (z := function(want, cos.double(), sin.double())).backward(weights.double())
    eps = torch.finfo(dtype).eps
    bound = 4 * eps * (q.double().abs().amax() * 2), 4 * eps * (weights.double().abs().amax() * 2)
    assert (y.double() - z).abs().max() <= bound[0]
    assert (got.grad.double() - want.grad).abs().max() <= bound[1]


def test_angles_that_are_learned_have_their_gradients():
    q, cos, sin = (t.clone().requires_grad_() for t in (Q, COS, SIN))
    fast = accelerated(written, q, cos, sin)
    assert len(fast.report()["fuse-rope"].applied) == 1
    agree(Function(written), fast, q, cos, sin)
    weights = torch.randn(Q.shape)
    got = torch.autograd.grad(fast(q, cos, sin), (q, cos, sin), weights)
    want = torch.autograd.grad(written(q, cos, sin), (q, cos, sin), weights)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_second_run_finds_nothing():
    program = session(accelerated(written, Q, COS, SIN)).all[0].program
    (record,) = manager.run(program, [FuseRope()]).report.passes
    assert (record.applied, record.refused, record.error) == ([], [], "")
