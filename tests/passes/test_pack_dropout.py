"""pack-dropout: the dropouts that it takes, draw for draw, and the bytes that it saves."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel.memory import Meter
from fxaccel.passes import PackDropout
from tests.helpers import session, targets

W = 16


class Drops(nn.Module):
    """A linear, what drops, and a linear."""

    def __init__(self, drop, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.drop, self.down = nn.Linear(W, 3 * W), drop, nn.Linear(3 * W, W)
        self.to(dtype)

    def forward(self, x):
        return self.down(self.drop(self.up(x)))


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


TAKEN = {
    "module": nn.Dropout(0.1),
    "function": Called(lambda x: F.dropout(x, 0.5)),
    "operator": Called(lambda x: torch.dropout(x, 0.2, True)),
    "turned": Called(lambda x: F.dropout(x.mT, 0.3).mT),
}
LEFT = {
    "idle": Called(lambda x: F.dropout(x, 0.0)),
    "all": Called(lambda x: F.dropout(x, 1.0)),
    "features": nn.Dropout1d(0.5),
    "alpha": nn.AlphaDropout(0.5),
}
X = torch.randn(2, 5, W, generator=torch.Generator().manual_seed(1))


def packed(model, x, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(model.train(), ["pack-dropout"], example_inputs=(x,), **options)
    return fast, fast.report()["pack-dropout"]


def step(model, x):
    model.zero_grad()
    torch.manual_seed(5)
    y = model(x)
    y.square().sum().backward()
    return [y.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TAKEN)
def test_the_very_numbers_forward_and_backward(name, dtype):
    model = Drops(TAKEN[name], dtype)
    fast, record = packed(model, X.to(dtype))
    assert len(record.applied) == 1
    assert "fxaccel.dropout.default" in targets(session(fast).all[-1].program)
    assert not session(fast).all[-1].program.redrawn  # it was checked against the model's own draws
    for x in (X.to(dtype), torch.randn(3, 7, W, dtype=dtype)):
        for got, want in zip(step(fast, x), step(model, x), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_such_dropout(name):
    model = Drops(LEFT[name])
    fast, record = packed(model, X)
    assert not record.applied
    for got, want in zip(step(fast, X), step(model, X), strict=True):
        assert torch.equal(got, want)


def test_in_inference_nothing_is_dropped():
    model = Drops(nn.Dropout(0.4)).eval()
    with pytest.warns(UserWarning, match="no operator of its pattern"):
        fast = fxaccel.accelerate(model, ["pack-dropout"], example_inputs=(X,))
    assert torch.equal(fast(X), model(X))


def test_another_device_keeps_bytes_itself():
    class Site:
        p = 0.5

        def val(self, name):
            return torch.empty(2, 3, device="meta")

    assert list(PackDropout().refuse(Site())) == ["on meta torch's dropout keeps bytes itself"]


def test_three_of_four_bytes_are_saved():
    model, x, alive = Drops(nn.Dropout(0.1)), torch.randn(64, W), []
    for one in (model.train(), packed(model, x)[0]):
        with Meter() as meter:
            y = one(x)
        alive.append(meter.live)
        del y
    assert alive[0] - alive[1] == 3 * 64 * 3 * W


def test_behind_it_a_checkpoint_gives_the_same_gradients():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Drops(nn.Dropout(0.1)) for _ in range(4))

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return x.square().mean()

    model, x = Block().train(), torch.randn(256, W)
    fast = fxaccel.accelerate(model, ["pack-dropout", "checkpoint{budget=0.7}"], example_inputs=(x,))
    assert fast.report()["checkpoint"].applied
    for one in (fast, model):
        model.zero_grad()
        torch.manual_seed(5)
        one(x).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        if one is fast:
            first = grads
    assert all(map(torch.equal, first, grads))
