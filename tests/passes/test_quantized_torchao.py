"""Models that torchao has quantized run on our kernels; models that we have quantized run on torchao's."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.passes import Quantize
from fxaccel.passes.quantized import torchao
from tests.helpers import session, targets

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor

WIDTH = 64


class Net(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.norm, self.again = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.other = nn.Linear(WIDTH, WIDTH)
        if tied:
            self.other.weight = self.again.weight

    def forward(self, x):
        x = self.again(self.norm(x + self.down(torch.relu(self.up(x)))))
        return torch.tanh(self.other(x))


CONFIGS = {
    "int8": (ao.Int8WeightOnlyConfig(version=2), {"weights": "int8", "inputs": "none"}),
    "int8 groups": (ao.Int8WeightOnlyConfig(granularity=PerGroup(32), version=2), None),
    "int8 dynamic": (ao.Int8DynamicActivationInt8WeightConfig(version=2), {"weights": "int8"}),
    "float8": (ao.Float8WeightOnlyConfig(), {"weights": "float8", "inputs": "none"}),
    "int4": (
        ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        {"weights": "int4", "inputs": "none", "zeros": False, "group": 32, "method": "nearest"},
    ),
}
ALLOWED = {"int8 dynamic": 2.0**-5}
"""What results may differ by. Ours are bfloat16 products of float32 inputs; where inputs are rounded by rows,
each library has its own formula for the scale of a row, and roundings of 1 % of an input differ at random."""
X = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))


def quantized(name, **options):
    model = Net(**options).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao.quantize_(model, copy.deepcopy(CONFIGS[name][0]))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_of_torchao_runs_on_our_kernels_with_its_own_codes(name, tmp_path):
    model = quantized(name)
    before = {n: p.qdata.clone() for n, p in model.named_parameters() if hasattr(p, "qdata")}
    with torch.no_grad():
        fast = fxaccel.accelerate(model)
        y, want = fast(X), model(X)
    assert float((y - want).norm() / want.norm()) < ALLOWED.get(name, 2.0**-8)
    used = targets(session(fast).all[0].program)
    op = "quantized_linear" if name == "int8 dynamic" else "weight_only_linear"
    assert used.count(f"fxaccel.{op}.default") == 4
    assert len(fast.report()["quantize"].applied) == 4
    for n, codes in before.items():
        assert torch.equal(model.get_parameter(n).qdata, codes)
        dense = model.get_parameter(n).dequantize()
        torch.testing.assert_close(fast.state_dict()[n], dense, rtol=1e-6, atol=1e-8)
        if codes.dtype == torch.int8 and name != "int4":
            assert torch.equal(fast.get_parameter(f"{n}_q"), codes)
    with torch.no_grad():
        fast.save(tmp_path / "net.fxa")
        assert torch.equal(fxaccel.load(tmp_path / "net.fxa")(X), y)


def test_tied_weights_of_torchao_stay_tied_and_other_passes_run_too():
    model = quantized("int8", tied=True)
    model.other.weight = model.again.weight
    with torch.no_grad():
        fast = fxaccel.accelerate(model, ["fuse-norm"])
        y, want = fast(X), model(X)
    assert float((y - want).norm() / want.norm()) < 2.0**-8
    assert sum(n.endswith("_q") for n, _ in fast.named_parameters()) == 3
    assert len(fast.report()["quantize"].applied) == 4
    assert fast.report()["fuse-norm"] is not None


@pytest.mark.parametrize("name", [n for n, (_, options) in CONFIGS.items() if options])
def test_what_we_quantize_loads_into_the_model_as_tensors_of_torchao(name):
    model = Net().eval()
    with torch.no_grad():
        fast = fxaccel.accelerate(
            model, [Quantize(even_if_slower=True, also="heads", **CONFIGS[name][1])], allow="approximate",
            example_inputs=(X,),
        )  # fmt: skip
        state = torchao.state_dict(fast)
        other = Net().eval()
        other.load_state_dict(state, assign=True)
        y, want = other(X), fast(X)
    kinds = {type(p).__name__ for n, p in other.named_parameters() if "weight" in n and "norm" not in n}
    assert kinds == {type(quantized(name).up.weight).__name__}
    assert float((y - want).norm() / want.norm()) < ALLOWED.get(name, 2.0**-8)
    held = fast.state_dict()["up.weight"]
    torch.testing.assert_close(other.up.weight.dequantize(), held, rtol=1e-6, atol=1e-8)


def test_what_has_no_equal_there_is_dense():
    with torch.no_grad():
        fast = fxaccel.accelerate(
            Net().eval(), [Quantize(weights="nf4", inputs="none", even_if_slower=True)],
            allow="approximate", example_inputs=(X,),
        )  # fmt: skip
        state = torchao.state_dict(fast)
    assert all(type(t) is torch.Tensor for t in state.values())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ao.Int8DynamicActivationInt8WeightConfig(granularity=PerTensor(), version=2), "up.weight "),
        (ao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0)), "is torch.int3, its "),
    ],
)  # fmt: skip
def test_kinds_without_an_equal_here_are_refused_before_anything_happens(config, words):
    model = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao.quantize_(model, config)
    with pytest.raises(OptionError, match=words):
        fxaccel.accelerate(model)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
    reason="torchao makes such weights from compute capability 8.9",
)
def test_float8_inputs_of_torchao():
    x, model = X.cuda(), Net().eval().cuda()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ao.quantize_(model, ao.Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    assert len(fxaccel.accelerate(model, example_inputs=(x,)).report()["quantize"].applied) == 4


def test_without_torchao_the_export_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(OptionError, match="torchao is not installed"):
        torchao.state_dict(nn.Linear(2, 2))
