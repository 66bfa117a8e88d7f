"""fuse-linear-loss: which losses it finds, which it leaves and why, and that values survive."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import manager
from fxaccel.errors import OptionError
from fxaccel.kernels import linear_cross_entropy as kernel
from fxaccel.listing import listing
from fxaccel.memory import Meter
from fxaccel.passes import Checkpoint, FuseLinearLoss
from tests.helpers import session, targets

F = nn.functional
D, V = 8, 37
ANY = FuseLinearLoss(least="0KiB")


class Head(nn.Module):
    """A head and a function of the module, hidden states and labels."""

    def __init__(self, function, bias=False, dtype=torch.float32):
        super().__init__()
        self.function, self.head = function, nn.Linear(D, V, bias=bias, dtype=dtype)
        self.vector = nn.Parameter(torch.rand(V, dtype=dtype))

    def forward(self, x, y):
        return self.function(self, x, y)


def example(batch=2, length=6, dtype=torch.float32, ignored=None):
    x, y = torch.randn(batch, length, D, dtype=dtype), torch.randint(0, V, (batch, length))
    if ignored is not None:
        y.view(-1)[::3] = ignored
    return x, y


def accelerated(model, x, y, passes=(ANY,), **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        return fxaccel.accelerate(model, passes=list(passes), example_inputs=(x, y), **options)


def record(fast):
    return fast.report()["fuse-linear-loss"]


def lines(fast):
    return [
        " ".join(line.split("#")[0].split()) for line in listing(session(fast).all[0].program).splitlines()
    ]


def results(model, x, y):
    """The loss and the gradients of hidden states and parameters."""
    x = x.detach().clone().requires_grad_()
    model.zero_grad()
    loss = model(x, y)
    loss.backward()
    return [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def agree(model, fast, x, y, ulps=8, rounded=None):
    """Each is as close to float64 as the original, or within a few eps of the largest value.

    rounded    the dtype that autocast rounds products to, where it is not that of x
    """
    exact = results(copy.deepcopy(model).double(), x.double(), y)
    for got, eager, want in zip(results(fast, x, y), results(model, x, y), exact, strict=True):
        assert got.dtype == eager.dtype
        eps = torch.finfo(rounded or x.dtype).eps
        allowed = 2 * (eager.double() - want).abs().max() + ulps * eps * want.abs().max()
        assert (got.double() - want).abs().max() <= allowed


# -- it fires --------------------------------------------------------------------------------------


def flat(logits):
    return logits.reshape(-1, logits.shape[-1])


def loss_of(logits, y, **options):
    return F.cross_entropy(flat(logits), y.reshape(-1), **options)


def as_transformers(m, x, y):
    """ForCausalLMLoss: labels padded and shifted, logits cast up."""
    logits, labels = m.head(x).float(), F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(logits.view(-1, V), labels.view(-1), ignore_index=-100, reduction="mean")


def with_squares(m, x, y):
    logits = m.head(x)
    return loss_of(logits, y) + 1e-2 * logits.logsumexp(-1).pow(2).mean()


def by_logsumexp(m, x, y):
    logits = m.head(x)
    return (logits.logsumexp(-1) - logits.gather(-1, y[..., None]).squeeze(-1)).mean()


def by_logsumexp_with_squares(m, x, y):
    logits = m.head(x)
    total = logits.logsumexp(-1, keepdim=True)
    return (total - logits.gather(-1, y[..., None])).sum() + (total * total).sum() * 1e-2


SPELLINGS = {
    "flat": (lambda m, x, y: loss_of(m.head(x), y), ")"),
    "rows": (lambda m, x, y: F.cross_entropy(m.head(flat(x)), y.view(-1)), ")"),
    "product": (lambda m, x, y: loss_of(x @ m.head.weight.T, y), ")"),
    "classes second": (lambda m, x, y: F.cross_entropy(m.head(x).transpose(1, 2), y), ")"),
    "sum": (lambda m, x, y: loss_of(m.head(x), y, reduction="sum"), ", 'sum')"),
    "sum over count": (lambda m, x, y: loss_of(m.head(x), y, reduction="sum") / (y != 9).sum(), ", 'sum')"),
    "smoothed": (
        lambda m, x, y: loss_of(m.head(x), y, label_smoothing=0.1, ignore_index=3), ", 'mean', 3, 0.1)",
    ),
    "shifted": (lambda m, x, y: loss_of(m.head(x)[:, :-1], y[:, 1:]), ")"),
    "shifted hidden states": (lambda m, x, y: loss_of(m.head(x[:, :-1]), y[:, 1:]), ")"),
    "last rows": (lambda m, x, y: F.cross_entropy(m.head(x)[:, -1], y[:, -1]), ")"),
    "one batch": (lambda m, x, y: F.cross_entropy(m.head(x[:1]).view(-1, V)[:-1], y[0, 1:]), ")"),
    "transformers": (as_transformers, ")"),
    "nll_loss": (lambda m, x, y: F.nll_loss(flat(F.log_softmax(m.head(x), -1)), y.view(-1)), ")"),
    "nll_loss, classes second": (
        lambda m, x, y: F.nll_loss(m.head(x).mT.log_softmax(1), y, ignore_index=2), ", 'mean', 2)",
    ),
    "logsumexp": (by_logsumexp, ", 'mean', None)"),
    "logsumexp, z-loss": (by_logsumexp_with_squares, ", 'sum', None, 0.0, 1.0, 0.0, 0.01)"),
    "log_softmax and gather": (
        lambda m, x, y: -m.head(x).log_softmax(-1).gather(-1, y[..., None]).mean(), ", 'mean', None)",
    ),
    "negated rows": (
        lambda m, x, y: (-m.head(x).log_softmax(-1).gather(2, y[..., None]).squeeze(2)).sum(),
        ", 'sum', None)",
    ),
    "z-loss": (with_squares, ", 'mean', -100, 0.0, 1.0, 0.0, 0.01)"),
    "softcap": (
        lambda m, x, y: loss_of(30 * torch.tanh(m.head(x) / 30), y), ", 'mean', -100, 0.0, 1.0, 30.0)",
    ),
    "scaled softcap": (
        lambda m, x, y: loss_of(torch.tanh(m.head(x) * 0.5) * 4.0, y), ", 'mean', -100, 0.0, 2.0, 4.0)",
    ),
    "softcap of rows": (
        lambda m, x, y: loss_of(30 * torch.tanh(m.head(x)[:, :-1] / 30), y[:, 1:]),
        ", 'mean', -100, 0.0, 1.0, 30.0)",
    ),
    "scaled": (lambda m, x, y: loss_of(m.head(x) / 4, y), ", 'mean', -100, 0.0, 0.25)"),
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_the_operator_and_its_values_survive(name):
    function, rest = SPELLINGS[name]
    model = Head(function)
    fast = accelerated(model, *example())
    assert len(record(fast).applied) == 1, fast.report()
    (call,) = [line for line in lines(fast) if "linear_cross_entropy" in line]
    assert call.endswith(rest)
    assert not {"aten.linear.default", "aten.logsumexp.default", "aten.tanh.default"} & set(
        targets(session(fast).all[0].program)
    )
    for sizes in ((2, 6), (3, 5)):
        agree(model, fast, *example(*sizes, ignored=3))
    assert len(fast.report().captures) == 1


def test_rows_of_logits_that_are_dropped_are_not_computed():
    fast = accelerated(Head(SPELLINGS["shifted"][0], bias=True), *example())
    assert lines(fast) == [
        "%slice_2 = aten.slice.Tensor(%y, 1, 1)",
        "%reshape_1 = aten.reshape(%slice_2, [-1])",
        "%slice_tensor = aten.slice.Tensor(%x, 1, 0, -1)",
        "%reshape_default = aten.reshape(%slice_tensor, [-1, 8])",
        "%cross_entropy_loss = fxaccel.linear_cross_entropy(%reshape_default, %p_head_weight, %p_head_bias,"
        " %reshape_1)",
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["flat", "transformers", "capped"])
def test_in_halves(name, dtype):
    def capped(m, x, y):
        return loss_of((30 * torch.tanh(m.head(x) / 30)).float(), y)

    function = capped if name == "capped" else SPELLINGS[name][0]
    model = Head(function, bias=True, dtype=dtype)
    x, y = example(dtype=dtype)
    fast = accelerated(model, x, y)
    assert len(record(fast).applied) == 1, fast.report()
    assert ("True)" in fast.code) == (name != "flat")  # the loss is in float32
    agree(model, fast, x, y)


def test_under_autocast():
    def mixed(m, x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(m.head(x), y)

    model = Head(mixed, bias=True)
    x, y = example()
    fast = accelerated(model, x, y)
    assert len(record(fast).applied) == 1, fast.report()
    agree(model, fast, x, y, ulps=2, rounded=torch.bfloat16)


def test_options_are_checked_and_reach_the_call():
    fast = accelerated(Head(SPELLINGS["flat"][0]), *example(), [FuseLinearLoss(budget="64KiB", least="0KiB")])
    assert fast.code.count("False, 65536)") == 1
    for options in ({"budget": "0.5"}, {"least": "1"}):
        with pytest.raises(OptionError, match="expected bytes"):
            FuseLinearLoss(**options)


def test_it_is_a_default_pass_that_leaves_small_losses():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(4, 4096, bias=False)

        def forward(self, x, y):
            return F.cross_entropy(self.head(x), y)

    model = Wide()
    for rows, applied in ((256, 1), (255, 0)):
        x, y = torch.randn(rows, 4), torch.randint(0, 4096, (rows,))
        fast = fxaccel.accelerate(model, example_inputs=(x, y), measure=False)
        assert len(record(fast).applied) == applied
        torch.testing.assert_close(fast(x, y), model(x, y))
    assert "all logits are 3.98 MiB; it is worth its calls from 4MiB on" in record(fast).refused[0].why


# -- it declines -----------------------------------------------------------------------------------


def cut(m, x, y):
    logits = m.head(x)
    return loss_of(logits[:, :-1], y[:, 1:]) + logits.logsumexp(-1).square().mean()


def other_reduction(m, x, y):
    logits = m.head(x)
    return loss_of(logits, y, reduction="sum") + logits.logsumexp(-1).square().mean()


def read_by_a_score(m, x, y):
    logits = m.head(x)
    return loss_of(logits, y), (logits.argmax(-1) == y).sum()


def returned(m, x, y):
    logits = m.head(x)
    return loss_of(logits, y), logits


DECLINED = {
    "returned": (returned, "logits are also a result, so they are made whole"),
    "score": (read_by_a_score, "the logits are also read by aten.argmax"),
    "no linear": (lambda m, x, y: loss_of(x, y % D), "the logits are %x, not the results of a linear"),
    "masked": (
        lambda m, x, y: loss_of(m.head(x).masked_fill(torch.arange(V) > 30, -1e9), y),
        "aten.where.ScalarOther stands between the linear and the loss",
    ),
    "a tensor's scale": (
        lambda m, x, y: loss_of(m.head(x) * m.vector, y),
        "aten.mul.Tensor stands between the linear and the loss",
    ),
    "dropped": (
        lambda m, x, y: loss_of(F.dropout(m.head(x), 0.5), y),
        "aten.dropout stands between the linear and the loss",
    ),
    "vocabulary cut": (
        lambda m, x, y: loss_of(m.head(x)[..., :30], y % 30),
        "aten.slice.Tensor stands between the linear and the loss",
    ),
    "capped twice": (
        lambda m, x, y: loss_of(torch.tanh(torch.tanh(m.head(x))), y),
        "the logits are scaled and capped in another way than softcap * tanh(x / softcap)",
    ),
    "another dimension": (
        lambda m, x, y: F.cross_entropy(m.head(x), y[:, :1].expand(-1, V) % 6),
        "dimension 1 of the linear's results is taken for the vocabulary",
    ),
    "double": (
        lambda m, x, y: loss_of(m.head(x).double(), y),
        "aten.to.dtype stands between the linear and the loss",
    ),
    "none": (
        lambda m, x, y: loss_of(m.head(x), y, reduction="none"),
        "the reduction is 'none', not one of mean, sum",
    ),
    "weights": (
        lambda m, x, y: loss_of(m.head(x), y, weight=m.vector.detach()),
        "the classes have weights",
    ),
    "probabilities": (
        lambda m, x, y: F.cross_entropy(flat(m.head(x)), flat(F.one_hot(y, V).float())),
        "the targets are probabilities, not labels",
    ),
    "one row": (lambda m, x, y: F.cross_entropy(m.head(x)[0, 0], y[0, 0]), "there is one row of logits"),
    "no log_softmax": (
        lambda m, x, y: F.nll_loss(flat(m.head(x)), y.view(-1)), "nll_loss is given no log_softmax",
    ),
    "twice": (
        lambda m, x, y: loss_of(m.head(x).log_softmax(-1), y), "the logits are a log_softmax",
    ),
    "other rows": (cut, "the squares of logsumexp are of other rows than the loss"),
    "other reduction": (other_reduction, "the loss is a sum, that of squares of logsumexp a mean"),
    "fewer rows": (
        lambda m, x, y: -m.head(x).log_softmax(-1).gather(-1, y[:, :3, None]).mean(),
        "fewer rows are gathered from than there are",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declines_and_says_why(name):
    function, why = DECLINED[name]
    model = Head(function)
    x, y = example()
    fast = accelerated(model, x, y)
    assert any(why in site.why for site in record(fast).refused), fast.report()
    assert record(fast).applied == []
    torch.manual_seed(0)
    want = model(x, y)
    torch.manual_seed(0)
    torch.testing.assert_close(fast(x, y), want)


@pytest.mark.parametrize("near", [
    lambda m, x, y: (m.head(x).logsumexp(-1) - m.head(x[:, :1]).gather(-1, y[:, :1, None])[..., 0]).mean(),
    lambda m, x, y: (m.head(x).logsumexp(1) - m.head(x).logsumexp(1).mean()).square().mean(),
    lambda m, x, y: (m.head(x).logsumexp(-1)[..., None] - m.head(x).gather(-1, y[:, :1, None])).mean(),
    lambda m, x, y: -m.head(x).log_softmax(-1).gather(1, y[..., None] % 6).mean(),
    lambda m, x, y: -m.head(x).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1).mean(0).sum(),
    lambda m, x, y: m.head(x).log_softmax(-1).gather(-1, y[..., None]).mean(),
])  # fmt: skip
def test_what_only_looks_like_a_loss_keeps_its_values(near):
    model = Head(near)
    x, y = example()
    fast = accelerated(model, x, y)
    assert record(fast).error == ""
    assert record(fast).applied == []
    torch.testing.assert_close(fast(x, y), model(x, y))


# -- values agree ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flat", "transformers", "z-loss"])
def test_ignored_labels_and_none_at_all(name):
    model = Head(SPELLINGS[name][0], bias=True)
    fast = accelerated(model, *example())
    agree(model, fast, *example(ignored=-100))
    x, y = example()
    y.fill_(-100)
    for got, want in zip(results(fast, x, y), results(model, x, y), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert model(x, y).isnan()
    y[0, 3] = 5
    agree(model, fast, x, y)


@pytest.mark.parametrize("name", ["flat", "logsumexp"])
def test_labels_out_of_range_raise_as_they_did(name):
    model = Head(SPELLINGS[name][0])
    fast = accelerated(model, *example())
    x, y = example()
    y[1, 1] = V
    for m in (model, fast):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            m(x, y)


class Tied(nn.Module):
    """A language model of one block whose head is its embedding."""

    def __init__(self, width=16, vocabulary=V, frozen=False):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU())
        self.outer, self.norm = nn.Linear(4 * width, width), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.embedding.weight.requires_grad_(not frozen)

    def forward(self, ids):
        x = self.embedding(ids)
        logits = self.head(self.norm(x + self.outer(self.inner(x))))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_head_that_is_tied_to_the_embedding(frozen):
    model, ids = Tied(frozen=frozen), torch.randint(0, V, (2, 7))
    fast = fxaccel.accelerate(model, passes=[ANY], example_inputs=(ids,))
    assert len(record(fast).applied) == 1
    found = []
    for m in (model, fast):
        model.zero_grad()
        m(ids).backward()
        found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for got, want in zip(*reversed(found), strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got, want)


def test_beside_fused_norms_under_checkpoint():
    model, ids = Tied(32, 401), torch.randint(0, 401, (4, 33))
    passes = [Checkpoint(budget=0.9), ANY, "fuse-norm"]
    fast = fxaccel.accelerate(model, passes=passes, example_inputs=(ids,), strict=True)
    assert [p.name for p in session(fast).all[0].report.passes] == [
        "fuse-linear-loss",
        "fuse-norm",
        "checkpoint",
    ]
    assert len(record(fast).applied) == 1
    assert "layer_norm" in fast.code
    found = []
    for m in (model, fast):
        model.zero_grad()
        m(ids).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for got, want in zip(*reversed(found), strict=True):
        torch.testing.assert_close(got, want)


def test_the_peak_of_a_step_is_less_than_an_eighth(monkeypatch):
    """The meter sees into the operator: where its kernel allocates, it counts."""
    ids = torch.randint(0, 4000, (8, 65))
    model = Tied(16, 4000)
    fast = fxaccel.accelerate(model, passes=[FuseLinearLoss(budget="256KiB")], example_inputs=(ids,))
    monkeypatch.setattr(kernel, "save_op", kernel.compose_save)
    peaks = []
    for m in (model, fast):
        model.zero_grad()
        with Meter() as meter:
            m(ids).backward()
        peaks.append(meter.peak)
    assert peaks[1] <= 0.125 * peaks[0]


# -- a second run finds nothing --------------------------------------------------------------------


def test_a_second_run_finds_nothing():
    fast = accelerated(Head(with_squares), *example())
    run = manager.run(session(fast).all[0].program, [ANY])
    (again,) = run.report.passes
    assert (again.applied, again.refused, again.near_misses, again.error) == ([], [], [], "")
