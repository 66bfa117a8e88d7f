"""smooth-inputs: which inputs it divides, what it leaves alone and why, and that nothing else changes."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.listing import listing
from fxaccel.passes import Quantize, SmoothInputs
from tests.helpers import session, thinned

WIDTH = 32


def calls(count=8, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, 9, WIDTH, generator=draw),) for _ in range(count)]


class Gated(nn.Module):
    """Two norms of outliers, two linears after each, one of them gated before a third."""

    def __init__(self, norm=nn.LayerNorm, between=lambda a, b: F.silu(a) * b):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = norm(WIDTH), norm(WIDTH), norm(WIDTH)
        for one in (self.first, self.second):
            one.weight.data = torch.rand(WIDTH) + 0.5
            one.weight.data[:3] *= 60
            if getattr(one, "bias", None) is not None:
                one.bias.data = torch.randn(WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, 70), nn.Linear(WIDTH, 70)
        self.down = nn.Linear(70, WIDTH)
        self.between = between

    def forward(self, x):
        h = self.first(x)
        x = x + torch.tanh(self.q(h)) * torch.sigmoid(self.k(h))
        h = self.second(x)
        return self.last(x + self.down(self.between(self.gate(h), self.up(h))))


def smoothed(model, *more, passes=(), given=None, **options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(
            model, [*passes, SmoothInputs(**options), *more], calibration=given or calls(),
            example_inputs=(given or calls())[0], allow="approximate",
        )  # fmt: skip
    return fast, fast.report()["smooth-inputs"]


def whys(record):
    return {s.path: s.why for s in record.refused}


# -- it fires --------------------------------------------------------------------------------------


@thinned(2, norm=[nn.LayerNorm, nn.RMSNorm], method=["smoothquant", "awq"], passes=[(), ("fuse-norm",)])
def test_factors_go_from_inputs_into_weights_and_nothing_changes(norm, method, passes, tmp_path):
    model, (x,) = Gated(norm).eval(), calls(1, seed=3)[0]
    fast, record = smoothed(model, method=method, group=16, passes=passes)
    assert {s.path for s in record.applied} == {"q", "k", "gate", "up", "down"}
    assert all(s.proof for s in record.applied)
    assert record.change < 1e-6
    with torch.no_grad():
        y = fast(x)
    torch.testing.assert_close(y, model(x), rtol=1e-5, atol=1e-5)
    assert fast.verify().ok
    held = fast.state_dict()
    assert held.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(held[name], value, rtol=1e-6, atol=1e-7)
    factors = fast.get_parameter("first.weight_factors")
    assert factors.max() / factors.min() > 2
    torch.testing.assert_close(fast.get_parameter("q.weight_smooth"), model.q.weight.data * factors)
    torch.testing.assert_close(fast.get_parameter("first.weight_smooth"), model.first.weight.data / factors)
    fast.save(tmp_path / "gated.fxa")
    loaded = fxaccel.load(tmp_path / "gated.fxa")
    with torch.no_grad():
        assert torch.equal(loaded(x), y)
    assert all(torch.equal(v, held[n]) for n, v in loaded.state_dict().items())


def test_the_graph_stays_as_it_was_but_for_names():
    model = Gated().eval()
    fast, _ = smoothed(model)
    one = session(fast).all[0]
    before, after = (
        [" ".join(line.split("#")[0].split()).replace("_smooth", "") for line in listing(p).splitlines()]
        for p in (one.canonical, one.program)
    )
    assert before == after


@pytest.mark.parametrize(
    ("method", "weights", "inputs"), [("smoothquant", "int8", "dynamic-int8"), ("awq", "int4", "none")]
)
def test_what_is_quantized_after_it_changes_less(method, weights, inputs, tmp_path):
    model = Gated().eval()
    after = Quantize(weights=weights, inputs=inputs, group=16, even_if_slower=True, method="nearest")
    with torch.no_grad():
        alone = fxaccel.accelerate(
            model, [after], calibration=calls(), example_inputs=calls(1)[0], allow="approximate"
        ).report()["quantize"]
    fast, _ = smoothed(model, after, method=method, group=16)
    record = fast.report()["quantize"]
    assert len(record.applied) == len(alone.applied) == 5
    assert record.change < 0.75 * alone.change
    dense = copy.deepcopy(model)
    dense.load_state_dict(fast.state_dict())  # weights that are rounded and divided again
    (x,) = calls(1, seed=3)[0]
    with torch.no_grad():
        y = fast(x)
        assert float((dense(x) - y).norm() / y.norm()) < 0.03
        fast.save(tmp_path / "gated.fxa")
        assert torch.equal(fxaccel.load(tmp_path / "gated.fxa")(x), y)


def test_a_relu_lets_factors_through_and_a_second_capture_keeps_them():
    model = Gated(between=lambda a, b: torch.relu(a)).eval()
    fast, record = smoothed(model)
    assert {s.path for s in record.applied} == {"q", "k", "gate", "down"}
    kept = fast.get_parameter("first.weight_factors").clone()
    with torch.no_grad():
        x = torch.randn(5, WIDTH)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    assert len(session(fast).all) == 2
    assert torch.equal(fast.get_parameter("first.weight_factors"), kept)
    assert len(fast.report()["smooth-inputs"].applied) >= 4


# -- it declines -----------------------------------------------------------------------------------


class Odd(Gated):
    def __init__(self, **changes):
        super().__init__()
        self.changes = changes
        if "plain" in changes:
            self.first = nn.LayerNorm(WIDTH, elementwise_affine=False)
        if "tied" in changes:
            self.k.weight = self.q.weight
        if "shared" in changes:
            self.second.weight = self.first.weight

    def forward(self, x):
        h = self.first(x)
        if "read" in self.changes:
            x = x + h.mean()
        if "own" in self.changes:
            h = h * F.linear(h, self.q.weight * 2)
        x = x + torch.tanh(self.q(h)) * torch.sigmoid(self.k(h))
        h = self.second(x)
        up = self.up(h)
        y = self.down(F.gelu(self.gate(h)) if "gelu" in self.changes else F.silu(self.gate(h)) * up)
        return self.last(x + y + (up.mean() if "twice" in self.changes else 0))


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ("plain", "q", "its input comes from a norm without weights"),
        ("read", "q", "its input is also read by aten.mean."),
        ("tied", "q", "a weight that reads its input is computed, tied or read elsewhere"),
        ("shared", "q", "a parameter that makes its input is computed, tied or read elsewhere"),
        ("gelu", "down", "its input comes from aten.gelu, through which factors do not pass"),
        ("twice", "down", "its input comes from no linear, through which factors do not pass"),
    ],
)
def test_inputs_that_are_not_divided_are_told_with_the_reason(change, path, words):
    model = Odd(**{change: True}).eval()
    fast, record = smoothed(model, insert=False, strength=0.5)
    told = whys(record)
    assert any(why.startswith(words) for why in told.values()), told
    other, record = smoothed(model, strength=0.5)
    if change == "tied":  # its weight cannot be multiplied for one of two linears
        assert path not in {s.path for s in record.applied}
    else:
        (said,) = [s.why for s in record.applied if s.path == path]
        assert said.startswith(f"its inputs are divided by themselves: {words}")
    (x,) = calls(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-5)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-6, atol=1e-7)


def test_norms_over_several_dimensions_and_values_with_other_readers_stay():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm([9, WIDTH]), nn.Linear(WIDTH, 8), nn.Linear(8, 4)

        def forward(self, x):
            h = torch.relu(self.up(self.norm(x)))
            return self.down(torch.relu(h)) + h.mean()

    record = smoothed(Wide().eval(), insert=False)[1]
    assert sorted(whys(record).values()) == [
        "%relu, which its input is made of, has other readers",
        "its input comes from a norm over several dimensions",
    ]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "gptq"}, "method is 'gptq', expected one of smoothquant, awq"),
        ({"strength": 2.0}, "strength is 2.0, expected a number from 0 to 1"),
        ({"weights": "int2"}, "the format is 'int2'"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(OptionError, match=words):
        SmoothInputs(**options)


def test_a_strength_that_does_not_help_is_not_used():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)).eval()
    model[0].weight.data = torch.ones(WIDTH, WIDTH)  # on the grid, and of inputs that are
    given = [(torch.randint(-127, 128, (3, WIDTH)).float(),) for _ in range(8)]
    for (x,) in given:
        x[:, 0] = 127
    record = smoothed(model, given=given)[1]
    assert whys(record) == {"0": "no factors lessen the error on rows of its inputs"}
    assert len(smoothed(model, given=given, strength=0.5)[1].applied) == 1


def test_it_serves_inference_alone():
    fast = fxaccel.accelerate(Gated().train(), [SmoothInputs()], allow="approximate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fast(*calls(1)[0])
    assert not fast.report()["smooth-inputs"].applied
