"""quantize{train=...}: floats that are rounded at each call, what they learn, and what convert() makes."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel.errors import CaptureError, OptionError
from fxaccel.kernels import fake_quantize, fake_quantize_rows
from fxaccel.listing import listing
from fxaccel.passes import Quantize, _linear_fits
from fxaccel.passes.quantized.matrix import INPUTS
from tests.helpers import session, targets, thinned, train_step

WIDTH = 24
FORMS = [(f, i) for i, formats in INPUTS.items() for f in formats]
KINDS = ("observed", "learned")
QUICK = [("int8", "dynamic-int8"), ("int4", "static-int8")]


class Net(nn.Module):
    """Two linears of one input, two in a row, norms around them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k = (nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH + 2), nn.Linear(2 * WIDTH + 2, WIDTH)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.q(h) * self.k(h)
        return self.last(x + self.down(F.gelu(self.up(x))))


class One(nn.Module):
    """A linear of odd sizes, and nothing else."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(1)
        self.l = nn.Linear(37, 20, bias=bias)

    def forward(self, x):
        return self.l(x)


class Tied(nn.Module):
    """A table that is the head too, and a weight that is read transposed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.table, self.head = nn.Embedding(30, WIDTH), nn.Linear(WIDTH, 30, bias=False)
        self.w = nn.Parameter(torch.randn(WIDTH, 2 * WIDTH) / 5)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head.weight = self.table.weight

    def forward(self, i):
        x = self.table(i)
        return self.head(F.layer_norm(x + self.down(torch.tanh(x @ self.w)), (WIDTH,)))


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def prepared(model, x, **options):
    """The model as it is trained, captured once."""
    options = {"train": "learned", "group": 8, **options}
    return fxaccel.accelerate(model, passes=[Quantize(**options)], allow="approximate", example_inputs=(x,))


def fitted(model, steps, lr, x, y):
    """The model after that many steps towards y."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    return model


def stepped(fast, x, steps=4, lr=1e-2):
    """Losses over a few steps, from which all that trains has moved."""
    optimizer = torch.optim.Adam(fast.parameters(), lr=lr)
    return [train_step(fast, optimizer, x) for _ in range(steps)]


def evaluated(fast, x):
    fast.eval()
    with torch.no_grad():
        return fast(x)


# -- it fires --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "scales"),
    [("observed", "None, None,"), ("learned", "%exp2_default, %p_q_weight_zero,")],
)
def test_weights_and_inputs_are_rounded_in_the_graph(train, scales):
    x = drawn(2, 5, WIDTH)
    fast = prepared(Net(), x, weights="int4", train=train, where="q|k")
    record = fast.report()["quantize"]
    assert {s.path for s in record.applied} == {"q", "k"}
    assert all(s.proof for s in record.applied)
    text = listing(session(fast).all[0].program).split("\n")
    lines = [" ".join(line.split("#")[0].split()) for line in text if "by quantize" in line]
    learned = train == "learned"
    assert lines[: 4 + learned] == [
        *["%exp2_default = aten.exp2(%p_q_weight_log_scale)"] * learned,
        f"%fake_quantize_default = fxaccel.fake_quantize(%p_q_weight_weight, {scales} 'int4', 8, True)",
        "%fake_quantize_rows_default = fxaccel.fake_quantize_rows(%fake_quantize_default, i8)",
        "%fake_quantize_rows_default_1 = fxaccel.fake_quantize_rows(%layer_norm, i8)",
        "%linear = aten.linear(%fake_quantize_rows_default_1, %fake_quantize_rows_default, %p_q_bias)",
    ]
    assert sum("(%layer_norm, i8)" in line for line in lines) == 1  # both linears read it
    by = " by mse" if learned else ""
    told = f"q.weight: int4-g8 with zeros{by}, inputs dynamic-int8, to train with {train} scales: 0."
    assert told in record.plan
    assert "of the bytes once converted" in record.plan


def test_nothing_is_timed_and_nothing_refused_for_its_time(monkeypatch):
    monkeypatch.setattr(_linear_fits.Fits, "timed", lambda *args: pytest.fail("a time was measured"))
    for train in KINDS:
        fast = prepared(Net(), drawn(2, 5, WIDTH), train=train)
        assert len(fast.report()["quantize"].applied) == 4


@thinned(6, form=FORMS, train=KINDS)
def test_everything_is_trained(form, train):
    format, inputs = form
    x = drawn(3, 40, WIDTH)
    model = Net()
    fast = prepared(model, x, weights=format, inputs=inputs, train=train)
    assert len(fast.report()["quantize"].applied) == 4
    before = {n: p.detach().clone() for n, p in fast.named_parameters()}
    more = ["zero"] * (format == "int4") + ["log_input_scale"] * (inputs == "static-int8")
    parts = ["weight", "log_scale", *more] if train == "learned" else ["weight"]
    assert [n for n in before if n.startswith("up.weight_")] == [f"up.weight_{p}" for p in parts]
    target = drawn(3, 40, WIDTH, seed=3)
    first = float(F.mse_loss(fast(x).detach(), target))
    fitted(fast, 25, 3e-3, x, target)
    assert float(F.mse_loss(fast(x).detach(), target)) < 0.9 * first
    assert all(not torch.equal(before[n], p) for n, p in fast.named_parameters())
    y = evaluated(fast, x)
    assert len(session(fast).replacements) == 4  # evaluation reads what training made
    fast.train()
    trained = fast(x).detach()
    if inputs == "none":  # the integer model's products are of bfloat16, and evaluation shows it
        assert 0 < float((y - trained).norm() / trained.norm()) < 2.0**-7
    else:
        assert torch.equal(y, trained)
    held = fast.state_dict()
    assert held.keys() == model.state_dict().keys()
    assert torch.equal(held["up.weight"], fast.get_parameter("up.weight_weight"))
    assert torch.equal(model.up.weight, Net().up.weight)  # the user's model is as it was


def test_gradients_are_those_of_the_rounded_model():
    """By autograd through a linear of the rounded values, straight through the rounding."""
    x = drawn(30, 37).requires_grad_()
    fast = prepared(One(), x.detach(), weights="int4", also="heads", group=8)
    dy = drawn(30, 20, seed=4)
    fast(x).backward(dy)
    named = dict(fast.named_parameters())
    weight, log, zero = (named[f"l.weight_{p}"] for p in ("weight", "log_scale", "zero"))
    wide = fake_quantize_rows.op(fake_quantize.op(weight, log.exp2(), zero, "int4", 8, True), torch.int8)
    seen = fake_quantize_rows.op(x, torch.int8)
    torch.testing.assert_close(x.grad, dy @ wide.detach())
    through = torch.autograd.grad(wide, (weight, log, zero), (dy.mT @ seen).detach())
    for got, want in zip((weight.grad, log.grad, zero.grad), through, strict=True):
        torch.testing.assert_close(got, want)
    assert log.grad.any()


def test_what_was_held_fixed_stays_fixed():
    model = Net()
    model.up.weight.requires_grad_(False)
    fast = prepared(model, drawn(2, 5, WIDTH))
    assert not fast.get_parameter("up.weight_weight").requires_grad
    assert not fast.get_parameter("up.weight_log_scale").requires_grad
    assert fast.get_parameter("down.weight_weight").requires_grad


@thinned(4, form=FORMS, train=KINDS, dtype=[torch.float32, torch.bfloat16])
def test_the_integer_model_computes_what_was_trained(form, train, dtype):
    format, inputs = form
    """fp32 loses an eps a summand on both sides; bf16 rounds inputs, weights and both results once."""
    x, model = drawn(40, 37, dtype=dtype), One().to(dtype)
    fast = prepared(model, x, weights=format, inputs=inputs, train=train, also="heads")
    stepped(fast, x)
    before = evaluated(fast, x)
    (way,) = (r.forward for r in session(fast).replacements)
    named = dict(fast.named_parameters())
    parts = [named[f"l.weight_{p}"].detach() for p in way.form.parts]
    dense = way.form.dense(fxaccel.passes._linear_form.EAGER, *parts)
    bias = named["l.bias"].detach()
    assert fast.convert() is fast
    after = evaluated(fast, x)
    assert torch.equal(fast.state_dict()["l.weight"], dense)
    assert fast.verify().ok
    used = targets(session(fast).all[0].program)
    assert not any("fake" in name for name in used)
    kernel = "weight_only_linear" if inputs == "none" else "quantized_linear"
    assert f"fxaccel.{kernel}.default" in used
    terms = 1.1 * (x.double().abs() @ dense.double().abs().mT + bias.double().abs())  # as rounded, at most
    narrow = dtype == torch.bfloat16 or inputs == "none"
    own = 2 * torch.finfo(torch.bfloat16).eps if narrow else 0.0
    allowed = (2 * (37 + 4) * torch.finfo(torch.float32).eps + own) * terms
    assert ((after.double() - before.double()).abs() <= allowed).all()
    original = evaluated(copy.deepcopy(model), x)
    assert not torch.equal(before, original)


@pytest.mark.parametrize(
    ("format", "inputs"),
    [pytest.param(*form, marks=[] if form in QUICK else pytest.mark.slow) for form in FORMS],
)
def test_in_a_model(format, inputs, tmp_path):
    """Codes of inputs that come of sums may fall to the other side: one step of one input in thousands."""
    x, model = drawn(3, 40, WIDTH), Net()
    fast = prepared(model, x, weights=format, inputs=inputs)
    stepped(fast, x)
    y = evaluated(fast, x)
    fast.save(tmp_path / "before.fxa")
    loaded = fxaccel.load(tmp_path / "before.fxa")
    assert torch.equal(evaluated(loaded, x), y)
    with pytest.raises(CaptureError, match=r"nothing in this module waits(.|\n)*convert before saving"):
        loaded.convert()
    z = evaluated(fast.convert(), x)
    step = 2.0**-8 if inputs == "none" else 2.0**-7 if inputs == "dynamic-float8" else 2.0**-10
    assert float((y - z).norm() / z.norm()) < step
    assert not any(p.requires_grad for n, p in fast.named_parameters() if "weight_" in n)
    held = fast.state_dict()
    assert held.keys() == model.state_dict().keys()
    fast.save(tmp_path / "after.fxa")
    loaded = fxaccel.load(tmp_path / "after.fxa")
    assert torch.equal(evaluated(loaded, x), z)
    assert all(torch.equal(loaded.state_dict()[n], held[n]) for n in held)
    fast.train()  # what is around the weights can still be trained
    fast(x).square().sum().backward()
    assert fast.up.bias.grad.any()


def test_tables_heads_and_transposed_weights():
    i = torch.randint(30, (4, 9), generator=torch.Generator().manual_seed(0))
    for train in KINDS:
        model = Tied()
        fast = prepared(model, i, weights="int8", train=train, also="embeddings|heads")
        assert len(session(fast).replacements) == 3
        assert fast.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(v, model.state_dict()[n]) for n, v in fast.state_dict().items())
        losses = stepped(fast, i, steps=3, lr=1e-3)
        assert losses[-1] < losses[0]
        y = evaluated(fast, i)
        weights = fast.state_dict()
        z = evaluated(fast.convert(), i)
        assert float((y - z).norm() / z.norm()) < 2.0**-10
        off = {n: float((v - weights[n]).norm() / v.norm()) for n, v in fast.state_dict().items()}
        assert {n for n, e in off.items() if e} == {"table.weight", "head.weight", "w", "down.weight"}
        assert max(off.values()) < 0.01


def test_scales_that_moved_are_those_that_are_stored():
    x = drawn(3, 40, WIDTH)
    fast = prepared(Net(), x, weights="int8", inputs="static-int8")
    with torch.no_grad():
        fast.get_parameter("up.weight_log_scale").add_(0.3)
        fast.get_parameter("up.weight_log_input_scale").sub_(0.5)
    parts = ("log_scale", "log_input_scale")
    scale, by = (fast.get_parameter(f"up.weight_{p}").detach().exp2() for p in parts)
    y = evaluated(fast, x)
    z = evaluated(fast.convert(), x)
    assert torch.equal(fast.get_parameter("up.weight_scale"), scale)
    assert torch.equal(fast.get_parameter("up.weight_input_scale"), by)
    assert float((y - z).norm() / z.norm()) < 2.0**-10


def test_weights_that_are_loaded_find_their_scales_anew():
    x, other = drawn(3, 40, WIDTH), Net()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3)
    for train in KINDS:
        fast = prepared(Net(), x, weights="int8", train=train)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fast.load_state_dict(other.state_dict())
        assert all(torch.equal(v, fast.state_dict()[n]) for n, v in other.state_dict().items())
        z = evaluated(fast.convert(), x)
        want = evaluated(other, x)
        assert float((z - want).norm() / want.norm()) < 0.02


def test_copies_are_converted_by_themselves():
    x = drawn(3, 40, WIDTH)
    fast = prepared(Net(), x)
    y = evaluated(fast, x)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        z = evaluated(other.convert(), x)
        assert float((y - z).norm() / z.norm()) < 2.0**-10
        assert "up.weight_q" in dict(other.named_parameters())
    assert "up.weight_weight" in dict(fast.named_parameters())
    assert torch.equal(evaluated(fast, x), y)


def test_what_cannot_be_converted():
    x = drawn(3, 40, WIDTH)
    waits = "nothing in this module waits to be converted"
    uncalled = fxaccel.accelerate(Net(), passes=[Quantize(train="learned")], allow="approximate")
    with pytest.raises(CaptureError, match=waits):
        uncalled.convert()
    with pytest.raises(CaptureError, match=waits):
        prepared(Net(), x, train="frozen", even_if_slower=True).convert()
    fast = prepared(Net(), x)
    with torch.no_grad():
        fast.get_parameter("down.weight_weight")[0, 0] = torch.nan
    names = [n for n, _ in fast.named_parameters()]
    with pytest.raises(OptionError, match="holds 1 values that are not finite"):
        fast.convert()
    assert [n for n, _ in fast.named_parameters()] == names
    fast.get_parameter("down.weight_weight").data.nan_to_num_()
    fast.convert()
    with pytest.raises(CaptureError, match=waits):
        fast.convert()


def test_options():
    with pytest.raises(OptionError, match="train names 'on', expected some of frozen, observed, learned"):
        Quantize(train="on")
    with pytest.raises(OptionError, match="method is gptq beside learned scales, expected nearest or mse"):
        Quantize(train="learned", method="gptq")
    with pytest.raises(OptionError, match="method is mse beside observed scales, expected nearest"):
        Quantize(train="observed", method="mse")
    assert str(Quantize(train="learned")) == "quantize{train=learned}"


def test_formats_are_chosen_by_what_they_become():
    """Of int4 6 bits with a scale for 8 columns, of int8 9 with one for 24 or 50: some become either."""
    fast = prepared(Net(), drawn(3, 40, WIDTH), weights="int8|int4", effective_bits=7.5, zeros=False)
    grids = {r.old[0]: r.forward.form.into.grid.bits for r in session(fast).replacements}
    assert set(grids.values()) == {4, 8}
    fast.convert()
    assert "weight_q" in "".join(n for n, _ in fast.named_parameters())


# -- what it is for --------------------------------------------------------------------------------


class Perceptron(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 64), nn.Linear(64, 64), nn.Linear(64, 6)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def task(count, seed):
    x = drawn(count, 6, seed=seed)
    return x, torch.sin(x @ drawn(6, 6, seed=9)) + 0.5 * x.square()


def loss(model):
    """On inputs that nothing was trained on."""
    x, y = task(2048, seed=2)
    return float(F.mse_loss(evaluated(model, x), y))


@pytest.mark.parametrize("inputs", ["none", pytest.param("dynamic-int8", marks=pytest.mark.slow)])
def test_training_recovers_half_of_what_rounding_costs(inputs):
    """Of the loss on unseen inputs, beside the float model after as many steps more.

    Biases that are trained around weights held fixed recover more than half as well; weights do better.
    """
    given = task(512, seed=1)
    start = fitted(Perceptron(), 800, 1e-2, *given)
    options = {"weights": "int4", "inputs": inputs, "group": 32, "also": "heads"}
    nearest = prepared(start, given[0], **options, train="frozen", method="nearest", even_if_slower=True)
    rounded, floats = loss(nearest), loss(fitted(copy.deepcopy(start), 150, 2e-3, *given))
    around = loss(fitted(nearest.train(), 150, 2e-3, *given))
    for train in KINDS:
        fast = prepared(start, given[0], **options, train=train)
        trained = loss(fitted(fast, 150, 2e-3, *given).convert())
        assert rounded > 1.5 * floats
        assert rounded - trained >= 0.5 * (rounded - floats)
        assert trained < around
