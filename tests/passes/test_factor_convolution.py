"""factor-convolution: the nearest chains of each kind, what they compute, and what stays and why."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel.errors import OptionError
from fxaccel.passes import FactorConvolution, _linear_fits
from fxaccel.passes._convolution_forms import (
    KINDS,
    DepthwiseSeparableConvolution,
    LowRankConvolution,
    SeparableConvolution,
    TuckerConvolution,
)
from fxaccel.passes._convolutions import Window
from fxaccel.passes._linear_form import EAGER
from tests.helpers import agree, captures, session, targets, thinned, train_step

WINDOWS = {
    "plain": Window((3, 3), (1, 1), (1, 1), (1, 1)),
    "strided": Window((3, 5), (2, 3), (1, 0), (1, 1)),
    "dilated": Window((2, 3), (1, 2), (3, 1), (2, 1)),
    "line": Window((4,), (2,), (1,), (1,)),
    "volume": Window((2, 3, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2)),
    "point": Window((1, 1), (2, 1), (0, 0), (1, 1)),
}
ROWS, CHANNELS = 7, 5


def forms(window, share=0.6):
    found = [kind.sized(ROWS, CHANNELS * window.count, window, share) for kind in KINDS.values()]
    return [f for f in found if f is not None]


def cases():
    return [pytest.param(f, id=f"{n}-{f.name}") for n, w in WINDOWS.items() for f in forms(w)]


def drawn(form, dtype=torch.float64):
    return tuple(torch.randn(shape, dtype=dtype) for shape in form.shapes)


def weights(window):
    return torch.randn(ROWS, CHANNELS, *window.sizes, dtype=torch.float64)


# -- forms -----------------------------------------------------------------------------------------


def test_each_kind_is_there_where_it_can_be():
    kinds = {name: {f.name for f in forms(w)} for name, w in WINDOWS.items()}
    every = set(KINDS)
    assert kinds == {
        "plain": every, "strided": every, "dilated": every, "line": every - {"separable"},
        "volume": every - {"separable"}, "point": {"low-rank"},
    }  # fmt: skip


@pytest.mark.parametrize("form", cases())
@pytest.mark.parametrize("biased", [True, False])
def test_the_chain_is_the_convolution_of_its_dense_weight(form, biased):
    window, parts = form.window, [p.requires_grad_() for p in drawn(form)]
    x = torch.randn(2, CHANNELS, *[7 + 2 * i for i in range(form.dims)], dtype=torch.float64)
    x.requires_grad_()
    bias = torch.randn(ROWS, dtype=torch.float64) if biased else None
    convolution = (F.conv1d, F.conv2d, F.conv3d)[form.dims - 1]
    dense = form.dense(EAGER, *parts)
    want = convolution(x, dense, bias, window.stride, window.padding, window.dilation)
    torch.testing.assert_close(form.linear(EAGER, x, parts, bias), want)
    torch.testing.assert_close(form.definition(EAGER, x, parts, bias), want)
    down = torch.randn_like(want)
    theirs = torch.autograd.grad(want, [x, *parts], down)
    ours = torch.autograd.grad(form.linear(EAGER, x, parts, bias), [x, *parts], down)
    torch.testing.assert_close(ours, theirs)
    unbatched = form.linear(EAGER, x[0], parts, bias)
    torch.testing.assert_close(unbatched, want[0])


@pytest.mark.parametrize("form", cases())
def test_a_weight_of_the_kind_is_recovered(form):
    weight = form.dense(EAGER, *drawn(form))
    assert form.error(weight, form.plain(weight)) < 1e-12
    low = form.plain(weight.float())
    assert {p.dtype for p in low} == {torch.float32}
    assert [tuple(p.shape) for p in low] == list(form.shapes)
    assert form.error(weight.float(), low) < 1e-6


def tail(matrix, rank):
    """What the nearest matrix of a rank is off by, squared (Eckart & Young)."""
    return float(torch.linalg.svdvals(matrix)[..., rank:].square().sum())


@pytest.mark.parametrize("window", ["plain", "strided", "dilated", "line", "volume", "point"])
def test_fits_are_the_optimum(window):
    window = WINDOWS[window]
    weight = weights(window)
    size = float(weight.square().sum())
    for form in forms(window, share=0.4):
        if isinstance(form, LowRankConvolution):
            best = tail(weight.flatten(1), form.rank)
        elif isinstance(form, SeparableConvolution):
            best = tail(weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1), form.rank)
        elif isinstance(form, DepthwiseSeparableConvolution):
            best = tail(weight.flatten(2).transpose(0, 1), form.multiplier)
        else:
            continue
        assert form.error(weight, form.plain(weight)) == pytest.approx(math.sqrt(best / size), rel=1e-9)


@thinned(3, seed=range(3))
def test_a_tucker_fit_is_never_worse_than_gradient_descent(seed):
    """Nor than the truncated decompositions that it starts from. Both end in optima of a neighbourhood."""
    torch.manual_seed(seed)
    window = WINDOWS["plain"]
    weight, form = weights(window), TuckerConvolution(ROWS, CHANNELS * 9, window, 3, 4)
    error = form.error(weight, form.plain(weight))
    w = weight.flatten(2)
    last = torch.linalg.svd(w.flatten(1)).U[:, :4]
    first = torch.linalg.svd(w.transpose(0, 1).flatten(1)).U[:, :3]
    core = torch.einsum("kcp,kq,cb->qbp", w, last, first)
    start = tuple(p.reshape(s) for p, s in zip((first.mT, core, last), form.shapes, strict=True))
    assert error <= form.error(weight, start) + 1e-12
    for _ in range(5):
        parts = [p.requires_grad_() for p in drawn(form)]
        optimizer = torch.optim.LBFGS(parts, max_iter=300, line_search_fn="strong_wolfe")

        def closure(parts=parts, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (form.dense(EAGER, *parts) - weight).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert error <= form.error(weight, parts) * 1.01


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
@pytest.mark.parametrize("name", KINDS)
def test_sizes_keep_to_the_share(name, share):
    for window in WINDOWS.values():
        for rows, channels in ((64, 32), (8, 3), (1, 1)):
            form = KINDS[name].sized(rows, channels * window.count, window, share)
            if form is not None:
                assert form.parameters <= share * rows * channels * window.count
                assert form.channels == channels


def test_flops_count_places_that_a_stride_leaves_out():
    """By what torch's counter says of both, at sizes that the strides divide."""
    from torch.utils.flop_counter import FlopCounterMode

    window = Window((3, 3), (2, 2), (1, 1), (1, 1))
    x, weight = torch.randn(2, 16, 16, 16), torch.randn(24, 16, 3, 3)
    for kind in KINDS.values():
        form = kind.sized(24, 16 * 9, window, 0.5)
        parts = form.plain(weight)
        with FlopCounterMode(display=False) as ours:
            form.linear(EAGER, x, parts, None)
        with FlopCounterMode(display=False) as theirs:
            window.call(EAGER, x, weight, None)
        share = ours.get_total_flops() / theirs.get_total_flops()
        assert form.work()[0] == pytest.approx(share, rel=1e-9)


# -- the pass --------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.tail = nn.Conv2d(16, 16, (3, 5), padding="same")
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.body(torch.relu(self.stem(x)))))
        return self.head(torch.relu(self.tail(x)).mean((2, 3)))


def images(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, 3, 12, 10, generator=draw),) for _ in range(count)]


def factored(model, *, calibration=None, passes=(), **options):
    given = images(8) if calibration is None else calibration
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(
            model, [*passes, FactorConvolution(**{"even_if_slower": True, **options})],
            calibration=given, allow="approximate", example_inputs=given[0],
        )  # fmt: skip
    return fast, fast.report()["factor-convolution"]


def whys(record):
    return {site.path: site.why for site in record.refused}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_the_kind_are_taken_apart_without_a_change(kind):
    model = Net().eval()
    for layer in (model.body, model.tail):
        window = Window(tuple(layer.kernel_size), (1, 1), (0, 0), (1, 1))
        form = KINDS[kind].sized(16, layer.weight.numel() // 16, window, 0.5)
        layer.weight.data = form.dense(EAGER, *drawn(form, torch.float32)) / 10
    fast, record = factored(model, structure=kind, share=0.5, budget="change<=1e-5", where="body|tail")
    assert [s.path for s in record.applied] == ["body", "tail"]
    assert all(site.proof for site in record.applied)
    assert record.change < 1e-5
    assert fast.verify().ok
    (x,) = images(1, seed=5)[0]
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-4, atol=1e-5)
    names = {n for n, _ in fast.named_parameters() if n.startswith("tail.")}
    assert names == {"tail.bias", *(f"tail.weight_{p}" for p in KINDS[kind].parts)}
    chain = len(KINDS[kind].parts)
    assert targets(session(fast).all[0].program).count("aten.conv2d.default") == 1 + 2 * chain


def test_the_budget_holds_and_is_spent():
    model, changes = Net().eval(), []
    for limit in (0.05, 0.2):
        record = factored(model, budget=f"change<={limit}")[1]
        assert record.change <= limit
        changes.append(record.change)
    assert 0 < changes[0] < changes[1]


class Odd(nn.Module):
    """Convolutions that stay."""

    def __init__(self):
        super().__init__()
        self.groups = nn.Conv2d(4, 8, 3, groups=2)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.even = nn.Conv2d(4, 4, 2, padding="same")
        self.twice, self.read = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.even(self.up(self.groups(x)))
        x = self.twice(x) + F.conv2d(x, self.twice.weight, padding=2, dilation=2)
        return self.read(x) * self.read.weight.mean() + F.conv2d(x, self.read.weight * 2)


def test_what_stays_is_told_with_the_reason():
    given = [(torch.randn(2, 4, 9, 9),)]
    record = factored(Odd().eval(), calibration=given, budget=9.0)[1]
    assert not record.applied
    assert sorted(s.why.split(" at ")[0] for s in record.refused) == [
        "it has 2 groups, which leave little to take apart",
        "it is transposed; there is no chain for it",
        "its weight is also read by aten.mul.Tensor",
        "its weight is computed, not a parameter of the model",
        "its weight is read by convolutions of other strides, paddings or dilations",
        "padding 'same' of [2, 2] is one more behind than before",
    ]
    tiny = nn.Sequential(nn.Conv2d(2, 2, 1)).eval()
    record = factored(tiny, calibration=[(torch.randn(2, 2, 3, 3),)], share=0.1)[1]
    assert whys(record) == {"0": "a weight of 2 x 2 has no such form of fewer parameters"}


def test_what_does_not_pay_in_time_stays_with_the_figures(monkeypatch):
    monkeypatch.setattr(
        _linear_fits, "least", lambda runs, device, rounds=5: [1.0] + [0.96] * (len(runs) - 1)
    )
    record = factored(
        Net().eval(), structure="low-rank", share=0.25, budget=9.0, even_if_slower=False, where="tail"
    )[1]
    assert whys(record) == {
        "tail": "nothing pays at 16 x 240 and 120 rows, expected 1.05 times as fast: low-rank(3) is 1.04 "
        "times as fast (0.96 ms for 1)"
    }


def test_times_are_those_of_the_captured_sizes_and_of_training():
    """A real measurement, of a size where the answer is beyond doubt."""
    model = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU()).eval()
    given = [(torch.randn(2, 128, 24, 24),)]
    for train in (False, True):
        with torch.set_grad_enabled(train):
            record = factored(
                model, calibration=given, structure="low-rank", share=0.0625, budget=9.0, even_if_slower=False
            )[1]
        (site,) = record.applied
        assert float(site.why.split(": ")[1].split(" times")[0]) > 1.5


def test_a_weight_of_two_convolutions_is_taken_apart_once():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(8, 8, 3, padding=1)
            self.b = nn.Conv1d(8, 8, 3, padding=1, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    model, given = Twice().eval(), [(torch.randn(3, 8, 20),) for _ in range(4)]
    fast, record = factored(model, calibration=given, structure="tucker", budget=9.0, share=0.5)
    assert [s.path for s in record.applied] == ["a", "b"]
    parts = [n.partition(".")[2] for n, _ in fast.named_parameters()]
    assert sorted(parts) == ["bias", "weight_core", "weight_first", "weight_last"]
    assert set(fast.state_dict()) == set(model.state_dict())


@pytest.fixture
def thin():
    model = Net().eval()
    return model, *factored(model, budget=9.0, share=0.4)


def test_the_state_dict_is_a_dense_checkpoint_of_the_same_function(thin, tmp_path):
    model, fast, record = thin
    assert len(record.applied) == 3
    (x,) = images(1, seed=3)[0]
    state, other = fast.state_dict(), Net(seed=1).eval()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}
    other.load_state_dict(state)
    with torch.no_grad():
        want = fast(x)
        torch.testing.assert_close(other(x), want, rtol=1e-4, atol=1e-5)
        fast.save(tmp_path / "m.fxa")
        assert torch.equal(fxaccel.load(tmp_path / "m.fxa")(x), want)
        torch.testing.assert_close(copy.deepcopy(fast)(x), want)
        torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(x), want)
    with pytest.warns(UserWarning, match=r"3 tensors .* projected: .*weight is off by 0\.\d+ of its norm"):
        fast.load_state_dict(model.state_dict())


def test_parts_train_and_other_modes_use_the_same(thin):
    fast = thin[1]
    fast.train()
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.02)
    (x,) = images(1)[0]
    losses = [train_step(fast, optimizer, x) for _ in range(5)]
    assert losses[-1] < losses[0]
    before = dict(fast.named_parameters())
    fast.eval()
    with torch.no_grad():
        fast(x)
        fast(torch.cat([x] * 6))  # the captured sizes decide on nothing that serves
    after = dict(fast.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[k] is after[k] for k in before)
    assert captures(fast) == 3  # evaluation with gradients, training, evaluation without


def test_with_passes_for_convolutions():
    """What is taken apart is folded, laid out and packed as any convolution."""
    model = Net().eval()
    model.norm.running_var.uniform_(0.5, 2)
    alone, _ = factored(model, structure="low-rank", budget=9.0, share=0.4)
    others = ("fold-batch-norm", "use-channels-last", "fuse-convolution")
    (x,) = images(1, seed=3)[0]
    with torch.no_grad():
        fast, record = factored(
            model, structure="low-rank", budget=9.0, share=0.4, passes=others[1:], calibration=[(x,)]
        )
        assert len(record.applied) == 3
        agree(alone, fast, x)
        folded, record = factored(model, budget=9.0, share=0.4, passes=others, calibration=[(x,)])
    assert set(whys(record).values()) == {
        "its weight is computed, not a parameter of the model"
    }  # by the fold
    assert folded(x).shape == (4, 10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "monarch"}, "structure names 'monarch', expected some of low-rank, separable"),
        ({"share": 1.0}, "share is 1.0, expected a number from 0 to 1"),
        ({"budget": "wild<=1"}, "wild"),
    ],
)
def test_wrong_options_are_errors(options, words):
    with pytest.raises(OptionError, match=words):
        FactorConvolution(**options)


def test_it_needs_leave_and_does_not_run_by_default():
    assert not FactorConvolution.default
    with pytest.warns(UserWarning, match="pass allow='approximate' to use it"):
        fxaccel.accelerate(Net().eval(), ["factor-convolution"])(*images(1)[0])


def test_the_users_model_is_left_alone(thin):
    model, fast, _ = thin
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in Net().named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Net().parameters(), strict=True))
    assert session(fast).replacements
