"""merge-linears: which linears become one, which stay and why, and that nothing else changes."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel import manager
from fxaccel.listing import listing
from fxaccel.passes import MergeLinears
from tests.helpers import Method, session, targets, thinned

F = nn.functional
C = 6
X = torch.randn(3, 5, C)
MERGE = MergeLinears(even_if_slower=True)
FOLD = MergeLinears(even_if_slower=True, fold=True)


class Attention(nn.Module):
    """Queries, narrower keys without a bias, and values."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(C, C), nn.Linear(C, 2, bias=False), nn.Linear(C, 4)

    def forward(self, x):
        return self.q(x).tanh() * torch.cat([self.k(x), self.v(x).sigmoid()], -1)


class Flipped(nn.Module):
    """A layer whose weight is [inputs, outputs], as GPT-2's."""

    def __init__(self, outputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(C, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def merged(model, *args, grad=False, options=MERGE):
    """(fast, its report of the pass)"""
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(model, passes=[options], example_inputs=args or (X,))
    return fast, fast.report()[options.name]


def text(fast):
    lines = listing(session(fast).all[0].program).splitlines()
    return [" ".join(line.split("#")[0].split()) for line in lines]


def agree(model, fast, *args, grad=True):
    """Outputs and all gradients, to what float64 leaves of them."""
    model, fast = copy.deepcopy(model).double(), copy.deepcopy(fast).double()
    got, want = [], []
    for m, results in ((fast, got), (model, want)):
        x = [a.double().requires_grad_(grad) for a in args or (X,)]
        with torch.set_grad_enabled(grad):
            out = m(*x)
        outs = out if isinstance(out, tuple) else (out,)
        results += outs
        if grad:
            sum(o.square().sum() for o in outs).backward()
            results += [a.grad for a in x]
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# -- it fires --------------------------------------------------------------------------------------


def test_queries_keys_and_values_are_one_linear_in_inference():
    model = Attention()
    fast, report = merged(model)
    assert text(fast) == [
        "%cat_default = aten.cat([%p_q_weight, %p_k_weight, %p_v_weight])",
        "%new_zeros_default = aten.new_zeros(%p_q_bias, [2])",
        "%cat_default_1 = aten.cat([%p_q_bias, %new_zeros_default, %p_v_bias])",
        "%linear_default = aten.linear(%x, %cat_default, %cat_default_1)",
        "%linear, %linear_1, %linear_2 = aten.split_with_sizes(%linear_default, [6, 2, 4], 2)",
        "%tanh = aten.tanh(%linear)",
        "%sigmoid = aten.sigmoid(%linear_2)",
        "%cat = aten.cat([%linear_1, %sigmoid], 2)",
        "%mul = aten.mul.Tensor(%tanh, %cat)",
    ]
    assert [s.path for s in report.applied] == ["q", "k", "v"]
    assert report.applied[0].why == "one of 3, of 6 + 2 + 4 outputs"
    assert report.applied[0].proof
    assert report.plan == "6 + 2 + 4 outputs of %x; 0 linears stay"
    (note,) = [n for c in fast.report().captures for n in c.notes]
    assert note.startswith("2 values of 0.00")  # computed once
    assert dict(fast.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_folded_they_are_one_parameter_and_biases_of_some_stay():
    fast, _ = merged(Attention(), grad=True, options=FOLD)
    assert text(fast)[:4] == [
        "%new_zeros_default = aten.new_zeros(%p_q_bias, [2])",
        "%cat_default_1 = aten.cat([%p_q_bias, %new_zeros_default, %p_v_bias])",
        "%linear_default = aten.linear(%x, %p_q_k_v_weight, %cat_default_1)",
        "%linear, %linear_1, %linear_2 = aten.split_with_sizes(%linear_default, [6, 2, 4], 2)",
    ]
    assert {n: tuple(p.shape) for n, p in fast.named_parameters()} == {
        "q_k_v_weight": (12, 6), "q.bias": (6,), "v.bias": (4,)
    }  # fmt: skip


def test_folded_biases_of_all_are_one_parameter_in_the_module_that_holds_them():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = nn.ModuleDict({"proj": nn.ModuleList(nn.Linear(C, 4) for _ in range(2))})
            self.out = nn.Linear(4, C)

        def forward(self, x):
            first, second = (f(x) for f in self.attn["proj"])
            return self.out(first * second)

    fast, report = merged(Block(), grad=True, options=FOLD)
    assert [n for n, _ in fast.named_parameters()] == [
        "attn.proj.0_1_weight", "attn.proj.0_1_bias", "out.weight", "out.bias"
    ]  # fmt: skip
    assert "aten.split.Tensor(%linear_default, 4, 2)" in text(fast)[1]
    assert len(report.applied) == 2


def pair(*, q=C, k=C, **more):
    """Two linears of the first argument; what `more` names goes to the second."""
    return {"q": nn.Linear(C, q), "k": nn.Linear(C, k, **more)}


def both(s, x):
    return s.q(x), s.k(x).tanh()


FIRED = {
    "two of a vector": (both, pair(k=2), (torch.randn(C),)),
    "without biases": (both, {"q": nn.Linear(C, 2, bias=False), "k": nn.Linear(C, 3, bias=False)}, (X,)),
    "transposed": (both, {"q": Flipped(4), "k": Flipped(4)}, (X,)),
    "many": (
        lambda s, x: torch.stack([f(x) for f in s.all]).prod(0),
        {"all": nn.ModuleList(nn.Linear(C, 2) for _ in range(7))},
        (X,),
    ),
    "two inputs": (lambda s, x, y: (*both(s, x), s.m(y) * s.n(y)),
                   pair() | {"m": nn.Linear(C, 2), "n": nn.Linear(C, 2)}, (X, torch.randn(2, C))),
}  # fmt: skip


@thinned(2, name=FIRED, options=[MERGE, FOLD])
def test_groups_of_every_kind(name, options):
    function, children, args = FIRED[name]
    model = Method(function, **copy.deepcopy(children))
    count = sum(isinstance(m, (nn.Linear, Flipped)) for m in model.modules())
    for grad in (False, True):
        fast, report = merged(model, *args, grad=grad, options=options)
        assert len(report.applied) == count, report.refused
        assert targets(session(fast).all[0].program).count("aten.linear.default") == (
            2 if name == "two inputs" else 1
        )
        agree(model, fast, *args, grad=grad)
        assert fast.state_dict().keys() == model.state_dict().keys()
    assert len(list(fast.parameters())) < len(list(model.parameters())) or options is MERGE
    assert fast.verify().ok


@pytest.mark.parametrize("options", [MERGE, FOLD], ids=str)
def test_a_group_may_read_a_linear_of_another_group(options):
    def function(m, x):
        k = m.k(x)
        return m.q(x).tanh() + m.a(k) * m.b(k)

    layers = {n: nn.Linear(C, C) for n in ("q", "k", "a", "b")}
    fast, report = merged(model := Method(function, **layers), options=options)
    assert (len(report.applied), report.error) == (4, "")
    torch.testing.assert_close(fast(X), model(X))


def test_results_that_are_outputs_have_storage_of_their_own():
    model = Method(lambda s, x: (s.q(x), s.k(x).unflatten(-1, (2, 3)).transpose(1, 2)), **pair())
    fast, report = merged(model)
    assert len(report.applied) == 2
    with torch.no_grad():
        q, k = fast(X)
    assert q.untyped_storage().nbytes() == k.untyped_storage().nbytes() == q.nbytes
    agree(model, fast, grad=False)


def test_frozen_and_trained_ones_are_groups_of_their_own():
    """As adapters beside a frozen model."""
    model = Method(
        lambda s, x: sum(f(x) for f in s.all), all=nn.ModuleList(nn.Linear(C, 2) for _ in range(4))
    )
    for i in (0, 2):
        model.all[i].requires_grad_(False)
    fast, report = merged(model, grad=True, options=FOLD)
    assert len(report.applied) == 4
    assert {n: p.requires_grad for n, p in fast.named_parameters()} == {
        "all.0_2_weight": False, "all.0_2_bias": False, "all.1_3_weight": True, "all.1_3_bias": True
    }  # fmt: skip
    assert len(merged(model)[1].plan.split(";")) == 2  # in inference they are all one


# -- it declines -----------------------------------------------------------------------------------


def written(s, x):
    q, k = both(s, x)
    x.mul_(2)
    return q, k


def apart(s, x):
    with torch.no_grad():
        q = s.q(x)
    return q, s.k(x)


def autocast(s, x):
    with torch.autocast("cpu", torch.bfloat16):
        return both(s, x)


def tie(model):
    model.other = nn.Linear(C, C)
    model.other.weight = model.q.weight
    return model


def frozen(model):
    model.q.requires_grad_(False)
    return model


DECLINED = {
    "computed": (lambda s, x: (F.linear(x, s.q.weight * 2), s.k(x)), None,
                 "its weight is not a matrix among the parameters of the model"),
    "vector": (lambda s, x: (F.linear(x, s.w), F.linear(x, s.w + 1)), None,
               "its weight is not a matrix among the parameters of the model"),
    "tied": (both, tie, "its weight is one tensor under the names"),
    "read": (lambda s, x: (s.q(x), s.k(x) + s.q.weight.sum()), None,
             "its weight is also read by aten.sum"),
    "returned": (lambda s, x: (s.q(x), s.k(x), s.q.weight), None,
                 "its weight is also read by the output"),
    "bias": (lambda s, x: (F.linear(x, s.q.weight, s.q.bias * 2), s.k(x)), None,
             "its bias %mul is computed"),
    "written": (written, None, "is written in place by aten.mul_"),
    "region": (apart, None, "no other linear of its input is like it: it lies in grad["),
    "transposed": (lambda s, x: (s.q(x), s.f(x)), None,
                   "like it: its weight is read transposed, read as it is with another"),
    "dtype": (autocast, lambda m: m.k.half() and m,
              "like it: its weight has dtype torch.float16, torch.float32 with another"),
    "frozen": (both, frozen, "like it: its weight in training is held fixed, trained with another"),
    "alone": (both, tie, "the other linears of its input stay"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_declines_and_says_why(name):
    function, change, why = DECLINED[name]
    model = Method(function, **pair(), f=Flipped(4))
    model.w = nn.Parameter(torch.randn(C))
    model = model if change is None else change(model)
    fast, report = merged(model, X.clone(), grad=True)
    assert any(why in s.why for s in report.refused), report.refused
    assert (report.applied, report.error) == ([], "")
    torch.testing.assert_close(fast(X.clone()), model(X.clone()))


def test_where_it_does_not_pay_it_is_not_done_unless_asked():
    for options, grad, sentences in (
        (MergeLinears(), False, {"on the CPU one product takes as long as those that it is made of"}),
        (MergeLinears(fold=True), True, {"on the CPU one product takes as long as those that it is made of"}),
        (
            MergeLinears(),
            True,
            {"on the CPU", "where gradients flow, its weight would be laid below the others"},
        ),
    ):
        report = merged(Attention(), grad=grad, options=options)[1]
        assert len(report.refused) == 3
        for site in report.refused:
            assert {s for s in sentences if s in site.why} == sentences
            assert len(site.why.split("; ")) == len(sentences)


def test_where_limits_it():
    model = Attention()
    assert merged(model, options=MergeLinears(even_if_slower=True, where="q|v"))[1].plan.startswith("6 + 4 ")


# -- captures of one module share what was merged --------------------------------------------------


class Other(nn.Module):
    """Linears that read one value in evaluation, and two in training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(C, C) for _ in range(3))

    def forward(self, x):
        if self.training:
            return self.a(x) + self.b(x * 2) * self.c(x) + self.b.weight.sum()
        return self.a(x) * self.b(x) + self.c(x * 2)


@pytest.mark.filterwarnings("ignore:pass")
def test_a_later_capture_reads_its_part_of_what_an_earlier_one_has_merged():
    model = Other().eval()
    fast, _ = merged(model, grad=True, options=FOLD)
    names = [n for n, _ in fast.named_parameters()]
    assert names == ["a_b_weight", "a_b_bias", "c.weight", "c.bias"]
    for training in (True, False):
        agree(model.train(training), fast.train(training))
    fast.train()(X)
    assert [n for n, _ in fast.named_parameters()] == names
    assert len(fast.report().captures) == 2
    refused = [s.why for s in fast.report()["merge-linears"].refused]
    assert any("an earlier capture has merged it into a_b_weight, none with another" in w for w in refused)


@pytest.mark.filterwarnings("ignore:pass")
def test_a_later_capture_may_read_nothing_of_it():
    class Either(Other):
        def forward(self, x):
            return self.c(x) if self.training else self.a(x) * self.b(x)

    model = Either().eval()
    fast, _ = merged(model, grad=True, options=FOLD)
    agree(model.train(), fast.train())
    agree(model.eval(), fast.eval())


# -- a second run finds nothing --------------------------------------------------------------------


@pytest.mark.parametrize("options", [MERGE, FOLD], ids=["computed", "fold"])
def test_a_second_run_finds_nothing(options):
    fast, _ = merged(Attention(), options=options)
    (record,) = manager.run(session(fast).all[0].program, [options]).report.passes
    assert (record.applied, record.refused, record.error) == ([], [], "")
