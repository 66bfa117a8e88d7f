"""layer-norm-to-rms-norm: which streams it converts, which it leaves and why, and that nothing changes."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.errors import ProofError
from fxaccel.listing import listing
from fxaccel.passes import LayerNormToRMSNorm, _zero_mean
from fxaccel.passes import layer_norm_to_rms_norm as made
from tests.helpers import session, targets

F = nn.functional
aten = torch.ops.aten
C = 6


class Norm(nn.LayerNorm):
    """With a weight and a bias that matter."""

    def __init__(self, width=C, **options):
        super().__init__(width, **options)
        for p in self.parameters():
            nn.init.normal_(p, 1.0)


class Block(nn.Module):
    def __init__(self, p=0.0):
        super().__init__()
        self.first, self.second = Norm(), Norm(eps=1e-3)
        self.mix, self.up, self.down = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(2 * C, C, bias=False)
        self.drop = nn.Dropout(p)

    def forward(self, h):
        h = h + self.drop(self.mix(self.first(h)))
        return h + self.drop(self.down(F.gelu(self.up(self.second(h)))))


class Net(nn.Module):
    """A pre-norm transformer without attention, the table of words tied to the head."""

    def __init__(self, layers=2, p=0.0, returned=False):
        super().__init__()
        self.words, self.places = nn.Embedding(11, C), nn.Embedding(7, C)
        self.layers = nn.ModuleList(Block(p) for _ in range(layers))
        self.last, self.head = Norm(), nn.Linear(C, 11, bias=False)
        self.head.weight, self.returned = self.words.weight, returned

    def forward(self, ids):
        h = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for layer in self.layers:
            h = layer(h)
        logits = self.head(self.last(h))
        return (logits, h) if self.returned else logits


IDS = torch.randint(0, 11, (3, 5))
CONVERT = LayerNormToRMSNorm(even_if_slower=True)


def converted(model, *args, grad=False, options=CONVERT):
    """(fast, its report of the pass)"""
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(model, passes=[options], example_inputs=args)
    return fast, fast.report()[options.name]


def agree(model, fast, *args, tolerance=1e-12):
    """Outputs and all gradients, in float64."""
    results = []
    for m in (model, fast):
        leaves = [a.detach().clone().requires_grad_() if a.is_floating_point() else a for a in args]
        out = m(*leaves)
        outs = out if isinstance(out, tuple) else (out,)
        wanted = [*m.parameters(), *(a for a in leaves if a.requires_grad)]
        loss = sum((o * torch.arange(o.numel()).view_as(o).sin()).sum() for o in outs)
        results.append([*outs, *torch.autograd.grad(loss, wanted, allow_unused=True)])
        with torch.no_grad():
            out = m(*leaves)
            results[-1] += out if isinstance(out, tuple) else [out]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def why(record):
    return {s.why for s in record.refused}


def lines(fast):
    """The operators from the first sum on, with their arguments."""
    text = listing(session(fast).all[0].program).splitlines()
    found = [" ".join(line.split("#")[0].split()) for line in text]
    return found[next(i for i, line in enumerate(found) if line.startswith("%add =")) :]


# -- it fires --------------------------------------------------------------------------------------


def test_a_stream_is_centred_at_its_sources_and_its_norms_are_exchanged():
    fast, record = converted(Net(layers=1).eval(), IDS)
    assert (len(record.applied), len(record.refused), record.error) == (3, 0, "")
    assert {s.why for s in record.applied} == {"one of 3 norms of a stream with 3 sources"}
    assert lines(fast) == [
        "%add = aten.add.Tensor(%embedding, %embedding_1)",
        "%mean_dim_3 = aten.mean.dim(%add, [2], True)",
        "%sub_tensor_3 = aten.sub.Tensor(%add, %mean_dim_3)",
        "%rms_norm_default = aten.rms_norm(%sub_tensor_3, [6], %p_layers_0_first_weight, 1e-05)",
        "%layer_norm = aten.add.Tensor(%rms_norm_default, %p_layers_0_first_bias)",
        "%mean_dim = aten.mean.dim(%p_layers_0_mix_weight, [0], True)",
        "%sub_tensor = aten.sub.Tensor(%p_layers_0_mix_weight, %mean_dim)",
        "%mean_dim_1 = aten.mean.dim(%p_layers_0_mix_bias, [0], True)",
        "%sub_tensor_1 = aten.sub.Tensor(%p_layers_0_mix_bias, %mean_dim_1)",
        "%linear = aten.linear(%layer_norm, %sub_tensor, %sub_tensor_1)",
        "%add_1 = aten.add.Tensor(%sub_tensor_3, %linear)",
        "%rms_norm_default_1 = aten.rms_norm(%add_1, [6], %p_layers_0_second_weight, 0.001)",
        "%layer_norm_1 = aten.add.Tensor(%rms_norm_default_1, %p_layers_0_second_bias)",
        "%linear_1 = aten.linear(%layer_norm_1, %p_layers_0_up_weight, %p_layers_0_up_bias)",
        "%gelu = aten.gelu(%linear_1)",
        "%mean_dim_2 = aten.mean.dim(%p_layers_0_down_weight, [0], True)",
        "%sub_tensor_2 = aten.sub.Tensor(%p_layers_0_down_weight, %mean_dim_2)",
        "%linear_2 = aten.linear(%gelu, %sub_tensor_2)",
        "%add_2 = aten.add.Tensor(%add_1, %linear_2)",
        "%rms_norm_default_2 = aten.rms_norm(%add_2, [6], %p_last_weight, 1e-05)",
        "%layer_norm_2 = aten.add.Tensor(%rms_norm_default_2, %p_last_bias)",
        "%linear_3 = aten.linear(%layer_norm_2, %p_head_weight)",
    ]


@pytest.mark.parametrize(
    ("train", "grad"), [(False, False), (True, True), pytest.param(False, True, marks=pytest.mark.slow)]
)
def test_values_and_gradients_are_those_of_the_original(grad, train):
    model = Net().double().train(train)
    fast, record = converted(model, IDS, grad=grad)
    assert len(record.applied) == 5
    assert "aten.layer_norm.default" not in targets(session(fast).all[0].program)
    agree(model, fast, IDS)
    agree(model, fast, torch.randint(0, 11, (2, 7)))
    assert fast.verify().ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_stays_within_its_rounding(dtype):
    model = Net().eval().to(dtype)
    fast, record = converted(model, IDS)
    assert len(record.applied) == 5
    assert fast.report().captures[0].check  # compared with float64 by accelerate itself
    with torch.no_grad():
        wide = copy.deepcopy(model).double()(IDS)
        errors = [(m(IDS).double() - wide).abs().max() for m in (model, fast)]
    assert errors[1] <= 4 * errors[0] + torch.finfo(dtype).eps * wide.abs().max()


@pytest.mark.parametrize(
    "optimizer", [pytest.param(torch.optim.SGD, marks=pytest.mark.slow), torch.optim.AdamW]
)
def test_training_takes_the_path_of_the_original(optimizer):
    model = Net().double()
    twin = copy.deepcopy(model)
    fast, record = converted(twin, IDS, grad=True)
    assert len(record.applied) == 5
    losses = []
    for m in (model, fast):
        steps = optimizer(m.parameters(), lr=0.05)
        losses.append([])
        for _ in range(20):
            loss = F.cross_entropy(m(IDS).flatten(0, 1), IDS.roll(1, 1).flatten())
            steps.zero_grad()
            loss.backward()
            steps.step()
            losses[-1].append(float(loss))
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    for a, b in zip(model.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
    with torch.no_grad():  # centred anew from the weights as they are now
        torch.testing.assert_close(fast(IDS), model(IDS), atol=1e-8, rtol=1e-8)


def test_the_state_dict_is_the_original_and_ties_stay():
    model = Net().eval()
    fast, _ = converted(model, IDS)
    assert all(torch.equal(fast.state_dict()[k], v) for k, v in model.state_dict().items())
    assert fast.head.weight is fast.words.weight
    other = Net().eval()
    fast.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(fast(IDS), other(IDS))


def test_a_saved_model_is_verified_again(tmp_path):
    model = Net().double().eval()
    fast, _ = converted(model, IDS)
    fast.save(tmp_path / "m.fxa")
    again = fxaccel.load(tmp_path / "m.fxa")
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), model(IDS), atol=1e-12, rtol=1e-12)
    found = again.verify()
    assert found.ok
    assert len(found.proofs) >= 5


FOLD = LayerNormToRMSNorm(even_if_slower=True, fold=True)


def test_folded_parameters_are_the_centred_ones_and_the_state_dict_is_the_original(tmp_path):
    model = Net().double().eval()
    fast, record = converted(model, IDS, options=FOLD)
    assert len(record.applied) == 5
    named = dict(fast.named_parameters())
    assert named["layers.0.mix.weight_centred"].mean(0).abs().max() < 1e-15
    assert {"layers.0.mix.bias_centred", "layers.1.down.weight_mean"} < set(named)
    assert "layers.0.mix.weight" not in named
    assert "derive" not in fast.code  # nothing is left to compute
    state = fast.state_dict()
    assert set(state) == set(model.state_dict())
    for name, want in model.state_dict().items():
        torch.testing.assert_close(state[name], want, atol=1e-15, rtol=1e-15)
    with torch.no_grad():
        torch.testing.assert_close(fast(IDS), model(IDS), atol=1e-12, rtol=1e-12)
        fast.save(tmp_path / "m.fxa")
        torch.testing.assert_close(fxaccel.load(tmp_path / "m.fxa")(IDS), model(IDS), atol=1e-12, rtol=1e-12)
        other = Net().double().eval()
        fast.load_state_dict(other.state_dict())
        torch.testing.assert_close(fast(IDS), other(IDS), atol=1e-12, rtol=1e-12)


def test_folded_it_trains_as_another_model_and_says_so():
    model = Net().double()
    fast, record = converted(model, IDS, grad=True, options=FOLD)
    assert len(record.applied) == 5
    (note,) = [n for n in fast.report().captures[0].notes if "folded" in n]
    assert "folded the centring into 6 parameters" in note
    assert "is not the original any more" in note
    torch.testing.assert_close(fast(IDS), model(IDS), atol=1e-12, rtol=1e-12)
    optimizer = torch.optim.AdamW(fast.parameters(), lr=0.05)
    for _ in range(3):
        fast(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.load_state_dict(fast.state_dict())  # whose mean is taken out again
    assert (fast(IDS) - model(IDS)).abs().max() > 1e-4
    assert fast.layers[0].mix.weight_centred.mean(0).abs().max() > 1e-6


def test_a_parameter_that_something_else_reads_is_not_folded():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm = nn.Linear(4, C), Norm()

        def forward(self, x):
            return self.norm(self.a(x)) * F.linear(x, self.a.weight).sigmoid()

    model = Twice().double()
    x = X.double()
    fast, record = converted(model, x, options=FOLD)
    assert len(record.applied) == 1
    assert set(dict(fast.named_parameters())) == {
        "a.weight",
        "a.bias_centred",
        "a.bias_mean",
        "norm.weight",
        "norm.bias",
    }
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=1e-12, rtol=1e-12)


def test_conv1d_layers_of_gpt2_are_folded_as_they_are_stored():
    class Conv1D(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias, self.norm = (
                nn.Parameter(torch.randn(4, C)),
                nn.Parameter(torch.randn(C)),
                Norm(),
            )

        def forward(self, x):
            return self.norm(torch.addmm(self.bias, x.view(-1, 4), self.weight))

    model, x = Conv1D().double(), X.double()
    fast, record = converted(model, x, options=FOLD)
    assert len(record.applied) == 1
    assert fast.weight_mean.shape == (4, 1)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), atol=1e-12, rtol=1e-12)


class Vision(nn.Module):
    """Patches by a convolution, a class token, a position table, scaled branches, stochastic depth."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, C, 2, stride=2)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, C)), nn.Parameter(torch.randn(1, 5, C))
        self.first, self.last = Norm(), Norm()
        self.mix, self.scale = nn.Linear(C, C), nn.Parameter(torch.randn(C))
        self.head = nn.Linear(C, 2)

    def forward(self, image, kept):
        h = self.patches(image).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(h.shape[0], -1, -1), h], 1) + self.places
        h = h + self.mix(self.first(h)) * self.scale * kept[:, None, None]
        return self.head(self.last(h[:, 0]))


class Masked(nn.Module):
    """A stream through fills, choices, casts, pools and slices."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm, self.bare = (
            nn.Linear(4, C),
            nn.Linear(4, C),
            Norm(),
            nn.LayerNorm(C, elementwise_affine=False),
        )

    def forward(self, x, mask):
        a = self.a(x).masked_fill(mask[..., None], 0.0)
        h = torch.where(mask[..., None], a, self.b(x)) - a / 3
        h = torch.stack([h, self.bare(h)], 1).mean(1)
        return self.norm(h[:, 1:].sum(1) * mask.sum()), self.bare(h.to(torch.float64).reshape(-1, C))


class Shared(nn.Module):
    """One layer's weights used twice, as ALBERT does."""

    def __init__(self):
        super().__init__()
        self.into, self.block, self.last = nn.Linear(4, C), Block(), Norm()

    def forward(self, x):
        return self.last(self.block(self.block(self.into(x))))


class Bare(nn.Module):
    """A norm without a weight has zero mean: it is a norm of one stream and the source of the next."""

    def __init__(self):
        super().__init__()
        self.into, self.block = nn.Linear(4, 4), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))

    def forward(self, x):
        h = self.into(x)
        return self.block(F.layer_norm(h, (4,))), self.block(h)


X = torch.randn(3, 5, 4)


@pytest.mark.parametrize(
    ("model", "args", "count"),
    [
        (Vision, (torch.randn(2, 3, 4, 4), torch.tensor([0.0, 2.0])), 2),
        (Masked, (X, torch.rand(3, 5) > 0.5), 3),
        (Shared, (X,), 5),
        (Bare, (X,), 3),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
@pytest.mark.parametrize("grad", [pytest.param(False, marks=pytest.mark.slow), True])
def test_other_producers_and_what_may_lie_between(model, args, count, grad):
    model = model().double().eval()
    args = tuple(a.double() if a.is_floating_point() else a for a in args)
    fast, record = converted(model, *args, grad=grad)
    assert (len(record.applied), record.error) == (count, ""), why(record)
    agree(model, fast, *args)


def test_weights_of_shared_layers_are_centred_once():
    fast, _ = converted(Shared().eval(), X)
    assert targets(session(fast).all[0].program).count("aten.mean.dim") == 5  # three weights, two biases


def test_a_table_is_centred_where_that_is_done_once():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.kinds, self.norm = nn.Embedding(11, C), nn.Embedding(2, C), Norm()

        def forward(self, ids):
            return self.norm(self.words(ids) + self.kinds(ids % 2))

    model = Embedded().double()
    fast, record = converted(model, IDS)
    assert len(record.applied) == 1
    assert "2 by table" in record.plan
    agree(model, fast, IDS)  # with gradients it is left alone
    (sentence,) = why(converted(model, IDS, grad=True)[1])
    assert "a value of its stream would be centred at each call, which costs what its norms save" in sentence
    assert "the table of aten.embedding" in sentence
    assert "would be centred at each step" in sentence


def test_fuse_norm_takes_in_what_comes_of_it():
    model = Net().eval()
    with torch.no_grad():
        fast = fxaccel.accelerate(model, passes=["fuse-norm", CONVERT], example_inputs=(IDS,))
        assert list(fast.report()) == ["layer-norm-to-rms-norm", "fuse-norm"]
        assert not [t for t in targets(session(fast).all[0].program) if "layer_norm" in t]
        torch.testing.assert_close(fast(IDS), model(IDS))


# -- it declines -----------------------------------------------------------------------------------


class OneNorm(nn.Module):
    """A norm of what a function makes of two linears and an input."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function, self.norm = function, modules.pop("norm", None) or Norm()
        self.a, self.b = nn.Linear(4, C), nn.Linear(4, C)
        self.scale = nn.Parameter(torch.randn(C))
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def read_raw(m, x):
    h = m.a(x)
    return m.norm(h), h.sigmoid()


def returned(m, x):
    h = m.a(x)
    return m.norm(h), h


def dropped(m, x):
    return m.norm(m.a(x) + F.dropout(m.b(x), 0.5, True))


def scaled(m, x):
    return m.norm((m.a(x) + m.b(x)) * m.scale)


def activated(m, x):
    return m.norm(F.gelu(m.a(x)))


def given(m, x):
    return m.norm(x)


def after_norm(m, x):
    return m.norm(m.other(m.a(x).sigmoid()) + m.b(x))


def in_groups(m, x):
    return m.norm(m.conv(x.mT).mT)


def shifted(m, x):
    return m.norm(m.a(x) + 1.0)


def over_two(m, x):
    return m.two(m.a(x))


def written(m, x):
    h = m.a(x)
    part = h[:, 0]
    part.mul_(2.0)
    return m.norm(h)


def both_ways(m, x):
    h = torch.einsum("bi,bj->bij", m.a(x[:, 0]), m.b(x[:, 0]))
    h = h + m.a(x)[:, :1]
    return m.norm(h + h.mT)


DECLINED = {
    read_raw: "aten.linear at test_layer_norm_to_rms_norm.py:{} is also read by aten.sigmoid",
    returned: "is returned",
    dropped: "drops single channels between a producer and the stream",
    scaled: "scales the channels one by one",
    activated: "aten.gelu at test_layer_norm_to_rms_norm.py:{} has no weights of its own",
    given: "the input %x has whatever mean the caller gives it",
    after_norm: "give its result a mean",
    in_groups: "makes its channels in groups, of different inputs",
    shifted: "has no weights of its own that could be centred",
    over_two: "it normalises over 2 dimensions; an RMSNorm is over one",
    written: "of its stream is written in place",
    both_ways: "%add of its stream is read along two of its dimensions",
}
MODULES = {
    after_norm: {"other": Norm()},
    in_groups: {"conv": nn.Conv1d(4, 4, 1, groups=2), "norm": Norm(4)},
    over_two: {"two": nn.LayerNorm([5, C])},
    given: {"norm": Norm(4)},
}


@pytest.mark.parametrize("function", DECLINED, ids=lambda f: f.__name__)
def test_it_declines_with_the_clause_that_failed(function):
    model = OneNorm(function, **copy.deepcopy(MODULES.get(function, {})))
    fast, record = converted(model, X, grad=True)
    assert not record.applied
    assert record.error == ""
    sentence = "; ".join(why(record))
    for part in DECLINED[function].split("{}"):
        assert part in sentence
    torch.manual_seed(1)
    want = model(X)
    torch.manual_seed(1)
    torch.testing.assert_close(fast(X), want)


def test_on_the_cpu_nothing_is_made_slower_unless_asked_for():
    record = converted(Net(), IDS, options=LayerNormToRMSNorm())[1]
    assert not record.applied
    assert why(record) == {"on the CPU a LayerNorm is one fused kernel and the faster of the two"}


def test_weights_of_another_dtype_are_left():
    model = OneNorm(lambda m, x: m.norm(m.a(x)), norm=Norm()).to(torch.bfloat16)
    model.norm.float()
    record = converted(model, X.to(torch.bfloat16))[1]
    assert not record.applied
    assert why(record) == {"its input and weights are of dtypes torch.bfloat16, torch.float32"}


def test_dropout_between_producers_and_the_stream_counts_against_it():
    model = Net(p=0.5).train()
    record = converted(model, IDS, grad=True)[1]
    (sentence,) = why(record)
    assert sentence.startswith("5 values of its stream would be centred at each call, more than own=1: ")
    assert "drops single channels between a producer and the stream (2 times)" in sentence
    assert len(converted(model.eval(), IDS, grad=True)[1].applied) == 5
    model.train()
    asked = LayerNormToRMSNorm(even_if_slower=True, own=4)
    assert "more than own=4" in why(converted(model, IDS, grad=True, options=asked)[1]).pop()
    asked = LayerNormToRMSNorm(even_if_slower=True, own=9)  # as many as norms: nothing would be saved
    assert "which costs what its norms save" in why(converted(model, IDS, grad=True, options=asked)[1]).pop()


def test_a_stream_that_is_returned_stays_and_the_reason_is_its_end():
    record = converted(Net(returned=True), IDS)[1]
    assert len(record.refused) == 5
    (sentence,) = {s.rpartition(": ")[2] for s in why(record)}
    assert sentence.startswith("the value of aten.add.Tensor at test_layer_norm_to_rms_norm.py:")
    assert sentence.endswith(" is returned")


def test_where_limits_it_to_modules():
    asked = LayerNormToRMSNorm(even_if_slower=True, where="last")
    record = converted(Net(), IDS, options=asked)[1]
    assert not record.applied  # the other norms read the stream as it is
    (sentence,) = why(record)
    assert "is also read by aten.layer_norm" in sentence


# -- it is proved ----------------------------------------------------------------------------------


def test_a_link_that_does_not_commute_with_centring_is_caught(monkeypatch):
    monkeypatch.setitem(_zero_mean._LINKS, aten.gelu.default, lambda node, a, axis: [(a["self"], axis)])
    model = OneNorm(activated)
    record = converted(model, X)[1]
    assert not record.applied
    assert "LayerNormToRMSNorm: link failed its proof" in record.error
    with pytest.raises(ProofError, match="link failed its proof"), torch.no_grad():
        fxaccel.accelerate(model, passes=[CONVERT], example_inputs=(X,), strict=True)


def test_weights_centred_over_the_wrong_dimension_are_caught(monkeypatch):
    right = made.centre
    monkeypatch.setattr(made, "centre", lambda op, x, axis: right(op, x, -1 if axis == 0 else axis))
    record = converted(OneNorm(lambda m, x: m.norm(m.a(x))), X)[1]
    assert not record.applied
    assert "weights failed its proof" in record.error


def test_another_eps_is_caught(monkeypatch):
    right = _zero_mean.arguments
    monkeypatch.setattr(_zero_mean, "arguments", lambda node: {**right(node), "eps": 2e-5})
    record = converted(OneNorm(lambda m, x: m.norm(m.a(x))), X)[1]
    assert "norm failed its proof" in record.error
