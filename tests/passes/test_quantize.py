"""quantize: what linears become in each format, what is left alone and why, and what is kept of the model."""

import copy
import itertools
import os
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.listing import listing
from fxaccel.passes import Quantize, ReplaceLinear, _linear_fits
from fxaccel.passes.quantized import Grid
from fxaccel.passes.quantized.matrix import INPUTS, QuantizedMatrix
from tests.helpers import session, targets

WIDTH = 32
FORMS = [(f, i) for i, formats in INPUTS.items() for f in formats]


def calls(count, rows=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -1, WIDTH)
    return [(torch.randn(2, rows // 2, WIDTH, generator=draw) @ mix.T,) for _ in range(count)]


class Net(nn.Module):
    """Two linears of one input, two in a row, a norm before them and a head after."""

    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k = (nn.Linear(WIDTH, WIDTH, bias=bias) for _ in range(2))
        self.up, self.down = nn.Linear(WIDTH, 3 * WIDTH + 2), nn.Linear(3 * WIDTH + 2, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.q(h) * self.k(h)
        return self.head(self.last(x + self.down(F.gelu(self.up(x)))))


LINEARS = ("q", "k", "up", "down")


def quantized(model, *, calibration=None, passes=(), allow="approximate", **options):
    options = {"even_if_slower": True, "group": 16, **options}
    given = calls(8) if calibration is None else calibration
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(
            model, passes=[*passes, Quantize(**options)], calibration=given, allow=allow,
            example_inputs=given[0],
        )  # fmt: skip
    return fast, fast.report()["quantize"]


def whys(record):
    return {site.path: site.why for site in record.refused}


# -- it fires --------------------------------------------------------------------------------------


def test_linears_of_one_input_share_what_it_is_rounded_to():
    with torch.no_grad():
        fast, record = quantized(Net().eval(), where="q|k")
    assert {s.path for s in record.applied} == {"q", "k"}
    after = [
        " ".join(line.split("#")[0].split()) for line in listing(session(fast).all[0].program).split("\n")
    ]
    assert [line for line in after if "quantize" in line] == [
        "%getitem, %getitem_1 = fxaccel.quantize_rows(%layer_norm, i8)",
        "%linear = fxaccel.quantized_linear(%getitem, %getitem_1, %p_k_weight_q, %p_k_weight_scale, "
        "%p_k_bias, f32)",
        "%linear_1 = fxaccel.quantized_linear(%getitem, %getitem_1, %p_q_weight_q, %p_q_weight_scale, "
        "%p_q_bias, f32)",
    ]


def seen(x, form, model, name):
    """Inputs as a form sees them, by their definition."""
    if form.inputs == "none":
        return x.bfloat16().float() if form.narrow else x
    if form.inputs == "dynamic-float8":
        scale = x.abs().amax(-1, True) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale
    scale = x.abs().amax(-1, True) / 127
    if form.inputs == "static-int8":
        scale = dict(model.named_parameters())[f"{name}.weight_input_scale"]
    return (x / scale).round().clamp(-127, 127) * scale


@pytest.mark.parametrize(("format", "inputs"), FORMS)
def test_each_form_computes_a_linear_of_its_weight_and_its_inputs(format, inputs, tmp_path):
    model, (x,) = Net().eval(), calls(1, seed=5)[0]
    with torch.no_grad():
        fast, record = quantized(model, weights=format, inputs=inputs)
        y = fast(x)
    assert {s.path for s in record.applied} == set(LINEARS)
    assert all(s.proof for s in record.applied)
    assert fast.verify().ok
    by_hand, held = copy.deepcopy(model), fast.state_dict()
    assert held.keys() == model.state_dict().keys()
    forms = {r.old[0].partition(".")[0]: r.forward.form for r in session(fast).replacements}
    for name, form in forms.items():
        linear = by_hand.get_submodule(name)
        weight = held[f"{name}.weight"]
        error = (weight - linear.weight).norm() / linear.weight.norm()
        assert 0 < error < (0.15 if form.grid.bits == 4 else 0.03 if format == "float8" else 0.01)
        if form.grid.bits == 4 and inputs != "none":
            scale = weight.abs().amax(1, True) / 127
            weight = (weight / scale).round() * scale
        linear.weight.data = weight
        linear.register_forward_pre_hook(
            lambda _, given, form=form, name=name: (seen(given[0], form, fast, name),)
        )
    expected = by_hand(x)
    if forms["q"].narrow:
        allowed = 2.0**-8  # weights and results rounded to bfloat16, by 2**-9 of each
    else:  # a rounding of an input may fall to the other side: one step of one input in thousands
        allowed = 2.0**-7 if inputs == "dynamic-float8" else 2.0**-10
    assert float((y - expected).norm() / expected.norm()) < allowed
    assert float((y - model(x)).norm() / model(x).norm()) < (0.15 if forms["q"].grid.bits == 4 else 0.04)
    fast.save(tmp_path / "net.fxa")
    loaded = fxaccel.load(tmp_path / "net.fxa")
    with torch.no_grad():
        assert torch.equal(loaded(x), y)
    assert all(torch.equal(loaded.state_dict()[n], held[n]) for n in held)


@pytest.mark.parametrize(("format", "inputs"), [("int8", "dynamic-int8"), ("int4", "none"), ("nf4", "none")])
def test_a_file_is_as_large_as_its_bits(format, inputs, tmp_path):
    width = 1024
    layers = [nn.Linear(width, width, bias=False) for _ in range(4)]
    model, x = nn.Sequential(*layers, nn.LayerNorm(width)).eval(), torch.randn(2, width)
    with torch.no_grad():
        fast, _ = quantized(
            model, weights=format, inputs=inputs, group=64, calibration=[(x,)], method="nearest"
        )
    bits = {"int8": 8 + 32 / width, "int4": 4 + 32 / 64, "nf4": 4 + 16 / 64}[format]
    promised = 4 * width * width * bits / 8
    fast.save(tmp_path / "net.fxa")
    assert promised < os.path.getsize(tmp_path / "net.fxa") < 1.02 * promised
    held = sum(p.nbytes for n, p in fast.named_parameters() if "_" in n)
    assert held == promised


def test_the_method_is_the_best_there_is_data_for():
    model = Net().eval()
    for options, calibration, by in (
        ({"weights": "int4"}, None, "gptq"), ({"weights": "int4"}, [], "hqq"),
        ({"weights": "nf4", "aware": False}, None, "hqq"), ({"weights": "int8"}, None, ""),
        ({"weights": "int4", "method": "nearest"}, None, ""),
        ({"weights": "int8", "method": "mse"}, None, "mse"),
    ):  # fmt: skip
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            fast = fxaccel.accelerate(
                model, [Quantize(even_if_slower=True, group=16, **options)], allow="approximate",
                calibration=calls(8) if calibration is None else (), example_inputs=calls(1)[0],
            )  # fmt: skip
        told = fast.report()["quantize"].plan
        assert re.findall(r" by ([a-z]+)", told) == [by] * (4 * bool(by))


def test_gptq_changes_the_outputs_less_than_the_nearest_codes():
    change = {}
    for method in ("nearest", "hqq", "gptq"):
        with torch.no_grad():
            change[method] = quantized(Net().eval(), weights="int4", inputs="none", method=method)[1].change
    assert change["gptq"] < 0.9 * change["nearest"]


def test_a_budget_decides_which_weights_take_how_many_bits():
    with torch.no_grad():
        fine = quantized(Net().eval(), weights="int8")[1].change
        coarse = quantized(Net().eval(), weights="int4")[1].change
        limit = (fine + coarse) / 2
        _, record = quantized(Net().eval(), weights="int4|int8", budget=f"change<={limit}")
    assert record.change <= limit
    told = [s.why.partition(":")[0] for s in record.applied]
    assert any(t.startswith("int4") for t in told)
    assert len(told) == 4
    assert f"change<={limit:g}: change is " in record.plan
    with torch.no_grad():
        record = quantized(Net().eval(), weights="int4", budget="change<=1e-6")[1]
    assert not record.applied
    why = whys(record)["up"]
    assert why.startswith("the budget change<=1e-06 is better spent elsewhere: int4-g16 with zeros by gptq, ")


@pytest.mark.parametrize("bits", [7.0, 8.0])
def test_effective_bits_are_kept_on_average(bits):
    with torch.no_grad():
        fast, _ = quantized(Net().eval(), weights="int8|int4", effective_bits=bits)
    parts = [r.forward.form for r in session(fast).replacements]
    average = 8 * sum(f.nbytes(torch.float32) for f in parts) / sum(f.rows * f.columns for f in parts)
    assert len(parts) == 4
    assert bits - 2 < average <= bits
    assert {f.grid.format for f in parts} == {"int8", "int4"}


def test_structures_and_formats_of_one_model_stand_side_by_side():
    model = Net().eval()
    model.up.weight.data = torch.randn(3 * WIDTH + 2, 3) @ torch.randn(3, WIDTH)
    first = ReplaceLinear(structure="low-rank", where="up", even_if_slower=True, budget="change<=1e-4")
    with torch.no_grad():
        fast, record = quantized(model, passes=[first])
    assert [s.path for s in fast.report()["replace-linear"].applied] == ["up"]
    assert len(record.applied) == 5  # up's two factors among them
    names = {n for n, _ in fast.named_parameters() if n.startswith("up.weight")}
    assert names == {f"up.weight_{part}_{q}" for part, q in itertools.product(("down", "up"), ("q", "scale"))}
    (x,) = calls(1)[0]
    torch.testing.assert_close(fast.state_dict()["up.weight"], model.up.weight.data, rtol=0.1, atol=0.1)
    with torch.no_grad():
        assert float((fast(x) - model(x)).norm() / model(x).norm()) < 0.03


class Words(nn.Module):
    """A table, a linear that is used twice, and a head that may be the table."""

    def __init__(self, tied):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(40, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        return self.head(self.norm(x + self.mix(F.relu(self.mix(x)))))


IDS = [(torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(i)),) for i in range(8)]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {}, {"weights": "int4", "inputs": "none"}, {"weights": "int4"},
        {"weights": "float8", "inputs": "none", "tensorwise": True},
    ],
)  # fmt: skip
def test_tables_and_heads_are_quantized_on_request_and_shared_weights_once(tied, options, tmp_path):
    model = Words(tied).eval()
    with torch.no_grad():
        record = quantized(model, calibration=IDS, **options)[1]
        closed = {"head": "heads", "table": "embeddings"}
        for path, why in whys(record).items():
            roles = "heads and embeddings" if tied else closed[path]
            assert why == f"it is one of the {roles}"
        assert {s.path for s in record.applied} == {"mix"}
        assert len(record.applied) == 2
        fast, record = quantized(model, calibration=IDS, also="heads|embeddings", **options)
        assert {s.path for s in record.applied} == {"table", "mix", "head"}
        assert sum(n.endswith("_q") for n, _ in fast.named_parameters()) == (2 if tied else 3)
        out, want = fast(*IDS[0]), model(*IDS[0])
        assert float((out - want).norm() / want.norm()) < 0.15
        held = fast.state_dict()
        assert held.keys() == model.state_dict().keys()
        assert torch.equal(held["table.weight"], held["head.weight"]) == tied
        fast.save(tmp_path / "words.fxa")
        assert torch.equal(fxaccel.load(tmp_path / "words.fxa")(*IDS[0]), out)


# -- it declines -----------------------------------------------------------------------------------


def test_what_stays_is_told_with_the_reason(monkeypatch):
    with torch.no_grad():
        record = quantized(Net().eval(), policy="up:none q:int4")[1]
        assert whys(record)["up"] == "the policy has no format for it"
        told = {s.path: s.why for s in record.applied}
        assert told["q"].startswith("int4-g16")
        assert told["k"].startswith("int8, inputs dynamic-int8: ")
        monkeypatch.setattr(_linear_fits, "least", lambda runs, device: [1.0, *([0.96] * (len(runs) - 1))])
        record = quantized(Net().eval(), even_if_slower=False)[1]
    assert whys(record)["q"] == (
        "nothing pays at 32 x 32 and 24 rows, expected 1.05 times as fast: "
        "int8, inputs dynamic-int8 is 1.04 times as fast (0.96 ms for 1)"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "int3"}, "weights names 'int3', expected some of int8, int4, nf4, float8"),
        ({"inputs": "int8"}, "inputs names 'int8', expected some of none, dynamic-int8, "),
        ({"method": "awq"}, "method names 'awq', expected some of nearest, mse, gptq, hqq"),
        ({"weights": "float8"}, "inputs are dynamic-int8 beside weights of float8, expected weights of int8"),
        ({"policy": "up"}, "policy says 'up', expected a glob of module paths, ':' and a format"),
        ({"policy": "up:int2"}, "weights names 'int2'"),
        (
            {"also": "heads|tails"},
            "also names 'tails', expected some of attention-outputs, heads, embeddings",
        ),
        ({"observer": "max"}, "the method is 'max', expected one of absmax, percentile, mse"),
        ({"effective_bits": 64.0}, "effective_bits is 64.0, expected a number above 1, up to 32"),
        ({"effective_bits": 4.0, "budget": "kl<=1"}, "both a budget and effective_bits are given"),
        ({"group": 7, "weights": "int4"}, "group of a grid of int4 is 7, expected an even integer from 0"),
        ({"budget": "speed<=1"}, "speed"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(OptionError) as caught:
        Quantize(**options)
    assert words in str(caught.value)


def test_a_weight_that_is_not_finite_stops_the_pass_and_changes_nothing():
    model = Net().eval()
    model.up.weight.data[1, 2] = torch.nan
    with torch.no_grad():
        fast, record = quantized(model)
    assert "up.weight holds values that are not finite, expected finite ones" in record.error
    assert {n for n, _ in fast.named_parameters()} == {n for n, _ in model.named_parameters()}


# -- what is kept of the model ---------------------------------------------------------------------


def test_the_model_is_not_changed_and_rows_of_nan_stay_their_own():
    model = Net().eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        fast, _ = quantized(model)
        (x,) = calls(1)[0]
        clean, x = fast(x), x.clone()
        x[0, 3, 5] = torch.nan
        x[1, 2, 7] = torch.inf
        y = fast(x)
    bad = torch.zeros(x.shape[:2], dtype=torch.bool)
    bad[0, 3] = bad[1, 2] = True
    assert torch.equal(y[~bad], clean[~bad])
    assert not y[bad].isfinite().any()
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_in_training_the_weights_are_held_and_the_rest_learns(weights):
    model, (x,) = Net().train(), calls(1)[0]
    fast, _ = quantized(model, weights=weights)
    assert "fxaccel.quantized_linear.default" not in targets(session(fast).all[0].program)
    dense = copy.deepcopy(model)
    dense.load_state_dict(fast.state_dict())
    given, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    fast(given).square().sum().backward()
    dense(wanted).square().sum().backward()
    torch.testing.assert_close(given.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    learned = {n for n, p in fast.named_parameters() if p.requires_grad}
    assert learned == {n for n, _ in model.named_parameters()} - {f"{n}.weight" for n in LINEARS}
    for name in learned:
        got, want = fast.get_parameter(name).grad, dense.get_parameter(name).grad
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    codes = fast.get_parameter("up.weight_q").clone()
    torch.optim.AdamW(fast.parameters(), lr=0.1).step()
    assert torch.equal(fast.get_parameter("up.weight_q"), codes)
    with torch.no_grad():  # the same weights in the integer graph, which is captured now
        fast.eval()
        y = fast(x)
    assert targets(session(fast).all[-1].program).count("fxaccel.quantized_linear.default") == 4
    dense.load_state_dict(fast.state_dict())
    assert float((y - dense.eval()(x)).norm() / y.norm()) < 0.02


def test_a_capture_that_reads_what_a_later_one_replaced_is_made_again():
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        fast = fxaccel.accelerate(
            model, [Quantize(even_if_slower=True, policy="*:none")], allow="approximate"
        )  # nothing is replaced
        (x,) = calls(1)[0]
        fast.train()(x)
    other = fxaccel.accelerate(model, [Quantize(even_if_slower=True)], allow="approximate")
    fast_session = session(other)
    with torch.no_grad():
        fast_session.captures.update(session(fast).captures)  # one of the time before
        other.eval()(x)
    assert not any(c.reads({"up.weight"}) for c in fast_session.all)
    assert all(fast_session.captures.values())
    other.train()(x).sum().backward()
    assert other.norm.weight.grad is not None


def test_a_dense_checkpoint_is_rounded_as_it_is_loaded():
    model, other = Net().eval(), Net().eval()
    torch.nn.init.normal_(other.up.weight)
    with torch.no_grad():
        fast, _ = quantized(model)
        with pytest.warns(
            UserWarning, match="tensors of the state_dict do not fit .* up.weight is off by 0.00"
        ):
            fast.load_state_dict(other.state_dict())
        (x,) = calls(1)[0]
        assert float((fast(x) - other(x)).norm() / other(x).norm()) < 0.03
        held = fast.state_dict()["up.weight"]
    torch.testing.assert_close(
        held, other.up.weight.data, rtol=0, atol=float(other.up.weight.abs().max()) / 254
    )


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_half_precision_models_keep_their_dtype(weights):
    model = Net().eval().bfloat16()
    given = [(x.bfloat16(),) for (x,) in calls(8)]
    with torch.no_grad():
        fast, record = quantized(model, weights=weights, calibration=given)
        y, want = fast(*given[0]), model.float()(given[0][0].float())
    assert len(record.applied) == 4
    assert y.dtype == torch.bfloat16
    assert float((y.float() - want).norm() / want.norm()) < 0.15
    assert fast.state_dict()["up.weight"].dtype == torch.bfloat16


def test_forms_are_checked():
    with pytest.raises(OptionError, match="inputs are dynamic-float8 beside weights of int8"):
        QuantizedMatrix(4, 4, Grid("int8"), torch.float32, "dynamic-float8")
    assert str(QuantizedMatrix(4, 4, Grid("int4", 2), torch.float32, method="gptq")) == "int4-g2 by gptq"
