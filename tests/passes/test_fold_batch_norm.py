"""fold-batch-norm: what it folds, what it leaves and why, and that values survive."""

import warnings

import pytest
import torch
from torch import nn

import fxaccel
from tests.helpers import session, targets

F = nn.functional


def statistics(model, seed=0):
    """Give every BatchNorm weights and statistics that matter."""
    generator = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            for t in (m.weight, m.bias, m.running_mean):
                if t is not None:
                    t.data.normal_(0.5, 1.0, generator=generator)
            if m.running_var is not None:
                m.running_var.uniform_(0.1, 3.0, generator=generator)
    return model.eval()


def folded(model, *args, **options):
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(model, passes=["fold-batch-norm"], example_inputs=args, **options)
    return fast, fast.report()["fold-batch-norm"]


class Moved(nn.Module):
    """A linear, a function of its result, a norm over one dimension."""

    def __init__(self, function, width=6):
        super().__init__()
        self.function, self.linear, self.norm = function, nn.Linear(4, 6), nn.BatchNorm1d(width)

    def forward(self, x):
        return self.function(self, x)


def permuted(m, x):
    return m.norm(m.linear(x).transpose(1, 2))


def flattened(m, x):
    return m.norm(m.linear(x).flatten(0, 1))


IMAGE = torch.randn(2, 4, 9, 9)
S, X = nn.Sequential, torch.randn(2, 5, 4)
FOLDED = {
    "conv": lambda: (S(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6)), IMAGE),
    "conv without bias": lambda: (S(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), IMAGE),
    "in groups": lambda: (S(nn.Conv2d(4, 8, 3, stride=2, groups=2), nn.BatchNorm2d(8)), IMAGE),
    "padded same": lambda: (S(nn.Conv2d(4, 6, 3, padding="same"), nn.BatchNorm2d(6)), IMAGE),
    "one dimension": lambda: (S(nn.Conv1d(5, 6, 3, dilation=1), nn.BatchNorm1d(6, eps=0.1)), X),
    "three dimensions": lambda: (S(nn.Conv3d(4, 6, 2), nn.BatchNorm3d(6)), torch.randn(2, 4, 3, 3, 3)),
    "transposed": lambda: (S(nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), nn.BatchNorm2d(6)), IMAGE),
    "without weights": lambda: (S(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)), IMAGE),
    "linear": lambda: (S(nn.Linear(4, 6), nn.BatchNorm1d(6)), X[0]),
    "linear permuted": lambda: (Moved(permuted), X),
    "linear flattened": lambda: (Moved(flattened), X),
    "before a linear": lambda: (S(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)), X[0]),
    "before a conv": lambda: (S(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, stride=2)), IMAGE),
    "between two": lambda: (
        S(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1), nn.BatchNorm2d(3)), IMAGE
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDED)
def test_norms_are_folded_and_nothing_changes(name):
    model, x = FOLDED[name]()
    statistics(model).double()
    x = x.double()
    fast, record = folded(model, x)
    count = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert (len(record.applied), record.refused, record.error) == (count, [], "")
    assert "aten.batch_norm.default" not in targets(session(fast).all[0].program)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=1e-12, rtol=1e-12)
        for norm in model.modules():  # the statistics are read again when they change
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_var.mul_(2.0)
        fast.load_state_dict(model.state_dict())
        torch.testing.assert_close(fast(x), model(x), atol=1e-12, rtol=1e-12)
    assert fast.verify().ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_lower_precision_it_is_as_right_as_the_original(dtype):
    model, x = FOLDED["between two"]()
    statistics(model).to(dtype)
    fast, record = folded(model, x.to(dtype))
    assert len(record.applied) == 2
    with torch.no_grad():
        got, want = fast(x.to(dtype)), model(x.to(dtype))
        wide = model.double()(x.to(dtype).double())
    assert (got - wide).abs().max() <= 4 * (want - wide).abs().max() + torch.finfo(
        dtype
    ).eps * wide.abs().max()


def test_after_training_the_statistics_are_those_of_then():
    model, x = FOLDED["conv"]()
    statistics(model)
    fast, _ = folded(model, x)
    before = fast(x)
    fast.train()
    for _ in range(3):
        fast(3 * IMAGE + 1)
    fast.eval()
    model.load_state_dict(fast.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    assert not torch.allclose(fast(x), before)


def test_where_gradients_flow_it_stays_out_and_says_so():
    model, x = FOLDED["conv"]()
    with pytest.warns(UserWarning, match="applied nowhere"):
        fast = fxaccel.accelerate(statistics(model), passes=["fold-batch-norm"], example_inputs=(x,))
    assert "it serves inference only" in fast.report()["fold-batch-norm"].error


def test_it_runs_without_being_asked():
    model, x = FOLDED["conv"]()
    with torch.no_grad():
        fast = fxaccel.accelerate(statistics(model), example_inputs=(x,), measure=False)
    assert len(fast.report()["fold-batch-norm"].applied) == 1


class Read(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y), y.relu()


class Computed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.norm = nn.Parameter(torch.randn(6, 4, 1, 1)), nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(F.conv2d(x, self.weight * x.mean()))


def mixed(model):
    model[1].float()
    return model


def over_time(m, x):
    return m.norm(m.linear(x))


def wrong_dimension(m, x):
    return m.norm(m.linear(x).permute(1, 0, 2))


def wrong_reshape(m, x):
    return m.norm(m.linear(x).reshape(-1, 3))


DECLINED = {
    "is also read by aten.relu": lambda: (Read(), IMAGE),
    "%mul is not a parameter or a buffer that stays as it is": lambda: (Computed(), IMAGE),
    "the linear's outputs are dimension 2, the norm is over dimension 1": lambda: (Moved(over_time, 5), X),
    "permute [1, 0, 2] puts no outputs of a linear into the dimension that is normalised": lambda: (
        Moved(wrong_dimension, 2), X
    ),
    "does not keep the outputs of a linear last of two": lambda: (Moved(wrong_reshape, 3), X),
    "the transposed convolution has 2 groups": lambda: (
        S(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), IMAGE
    ),
    "the convolution pads the normed value with zeros, by [1, 1]": lambda: (
        S(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)), IMAGE
    ),
    "the convolution has 2 groups": lambda: (S(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), IMAGE),
    "the norm is over dimension 1, the linear reads dimension 2": lambda: (
        S(nn.BatchNorm1d(5), nn.Linear(4, 6)), X
    ),
    "a transposed convolution adds borders to what it reads": lambda: (
        S(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3)), IMAGE
    ),
    "a group norm takes its statistics from each input; there is nothing to fold": lambda: (
        S(nn.Conv2d(4, 6, 3), nn.GroupNorm(2, 6)), IMAGE
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", DECLINED)
def test_it_declines_with_the_reason(sentence):
    model, x = DECLINED[sentence]()
    statistics(model)
    fast, record = folded(model, x)
    assert not record.applied
    assert record.error == ""
    assert any(sentence in s.why for s in record.refused), record.refused
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))


def test_weights_and_statistics_of_two_dtypes_are_left():
    model = statistics(mixed(S(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).to(torch.bfloat16)))
    _, record = folded(model, IMAGE.to(torch.bfloat16))
    sentence = "weights, statistics and results are of dtypes torch.bfloat16, torch.float32"
    assert [s.why for s in record.refused] == [sentence]


def test_batch_statistics_are_not_folded():
    model = S(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)).eval()
    fast, record = folded(model, IMAGE)
    assert not record.applied
    assert "argument 'training' of aten.batch_norm" in record.near_misses[0].why
    with torch.no_grad():
        torch.testing.assert_close(fast(IMAGE), model(IMAGE))
