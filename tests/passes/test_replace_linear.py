"""replace-linear: what it puts in the place of weights, what it leaves alone and why, and the budget."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel.errors import CaptureError, OptionError
from fxaccel.passes import ReplaceLinear, _linear_fits
from fxaccel.passes.structured import EAGER, LowRank, Monarch
from fxaccel.quality import Budget
from tests.helpers import session, targets, thinned, train_step

WIDTH = 32


def calls(count, rows=48, seed=0, width=WIDTH):
    """Inputs of a quickly falling spectrum, as activations have."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(9)) * torch.logspace(0, -2, width)
    return [(torch.randn(rows, width, generator=draw) @ mix.T,) for _ in range(count)]


class Net(nn.Module):
    """Two linears of one block, and a head."""

    def __init__(self, structure=None, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)
        for linear in (self.up, self.down):
            shape = linear.weight.shape
            if structure is not None:
                made = structure(*shape)
                factors = made.random(1 / shape[1], torch.Generator().manual_seed(seed))
                linear.weight.data = made.dense(EAGER, *factors)

    def forward(self, x):
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


def replaced(model, *, calibration=None, example=None, passes=(), allow="approximate", **options):
    options = {"even_if_slower": True, **options}
    given = calls(8) if calibration is None else calibration
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(
            model, passes=[*passes, ReplaceLinear(**options)], calibration=given, allow=allow,
            example_inputs=example or given[0],
        )  # fmt: skip
    return fast, fast.report()["replace-linear"]


def whys(record):
    return {site.path: site.why for site in record.refused}


STRUCTURES = {
    "low-rank": lambda m, n: LowRank.sized(m, n, 0.25),
    "monarch": lambda m, n: Monarch.sized(m, n, 0.25),
}


@thinned(2, kind=STRUCTURES, aware=[False, True])
def test_weights_that_have_the_structure_are_replaced_without_a_change(kind, aware):
    model = Net(STRUCTURES[kind]).eval()
    fast, record = replaced(model, structure=kind, budget="change<=1e-5", aware=aware, share=0.25)
    assert len(record.applied) == 2
    assert record.change < 1e-5
    (x,) = calls(1, seed=5)[0]
    torch.testing.assert_close(fast(x), model(x))
    names = {n for n, _ in fast.named_parameters() if n.startswith("up.")}
    parts = ("down", "up") if kind == "low-rank" else ("right", "left")
    assert names == {"up.bias", *(f"up.weight_{p}" for p in parts)}
    assert sum(p.numel() for p in fast.parameters()) < sum(p.numel() for p in model.parameters())
    used = targets(session(fast).all[0].program)
    assert used.count("fxaccel.monarch.default") == (2 if kind == "monarch" else 0)
    assert used.count("aten.linear.default") == (1 if kind == "monarch" else 5)
    assert all(site.proof for site in record.applied)
    assert fast.verify().ok
    assert "2 weights change, change<=1e-05: change is " in record.plan
    assert " on the 2 calls that decided, " in record.plan
    assert " on 2 held out\n" in record.plan


def test_the_budget_holds_and_is_spent():
    model = Net().eval()
    changes = []
    for limit in (0.1, 0.2, 0.3):
        fast, record = replaced(model, structure="low-rank", budget=f"change<={limit}")
        assert record.change <= limit  # on all calls, those held out among them
        changes.append(record.change)
        unseen = calls(40, seed=77)
        with torch.no_grad():
            away = [float((fast(x) - model(x)).norm() / model(x).norm()) for (x,) in unseen]
        assert sum(away) / len(away) < 1.5 * limit
    assert changes[-1] > 0.5 * 0.3
    assert len(record.applied) == 2


def test_a_budget_that_nothing_fits_leaves_all_with_what_each_would_do():
    fast, record = replaced(Net().eval(), structure="low-rank", budget="change<=1e-9", share=0.25)
    assert not record.applied
    why = whys(record)["up"]
    assert why.startswith("the budget change<=1e-09 is better spent elsewhere: low-rank(")
    assert "alone makes change 0." in why
    assert "up.weight" in dict(fast.named_parameters())


def test_low_rank_of_as_many_parameters_is_told_of_beside_each():
    model = Net().eval()
    record = replaced(model, structure="monarch", share=0.5, budget=9.0, aware=False)[1]
    assert len(record.applied) == 2
    for site, linear in zip(record.applied, (model.up, model.down), strict=True):
        matrix = Monarch.sized(*linear.weight.shape, 0.5)
        low = LowRank(*linear.weight.shape, matrix.parameters // sum(linear.weight.shape))
        ours, its = (m.error(linear.weight, m.fit(linear.weight)) for m in (matrix, low))
        assert site.why.endswith(f"off by {ours:.2g}, {low} of as many parameters by {its:.2g}")


@pytest.mark.parametrize(
    ("budget", "most"),
    [
        ("kl<=0.01", 0.01),
        (Budget("rise", 0.05, lambda old, new: float((new - old).abs().mean())), 0.05),
    ],
)
def test_other_metrics(budget, most):
    model = Net().eval()
    fast, record = replaced(model, structure="low-rank", budget=budget)
    assert record.applied
    assert str(budget) in record.plan
    found = []
    with torch.no_grad():
        for (x,) in calls(8)[3::4]:
            old, new = model(x), fast(x)
            found.append(Budget.of(budget).measure(session(fast).all[0].program.out_spec, [old], [new]))
    assert sum(found) / len(found) <= most * 1.001


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, labels):
        return F.cross_entropy(self.net(x), labels)


def test_a_budget_on_the_loss():
    model = WithLoss().eval()
    given = [(x, torch.arange(len(x)) % 10) for (x,) in calls(8)]
    fast, record = replaced(model, calibration=given, structure="low-rank", budget="loss<=+1%")
    assert record.applied
    with torch.no_grad():
        old, new = [sum(float(f(*c)) for c in given[3::4]) for f in (model, fast)]
    assert new <= 1.01 * old
    assert all(n.startswith("net.") for n in whys(record))  # the head is known behind the loss
    assert whys(record)["net.head"] == "it is one of the heads"


def test_a_size_is_reached_with_the_least_change():
    model = Net().eval()
    before = sum(p.numel() for p in model.parameters())
    fast, record = replaced(model, structure="low-rank", budget="size<=0.6")
    assert sum(p.numel() for p in fast.parameters()) <= 0.6 * before
    worse = replaced(model, structure="low-rank", budget=9.0, share=0.25)[1]
    assert record.change < worse.change
    _, record = replaced(model, structure="low-rank", budget="size<=0.05")
    assert "can bring the model's parameters down to" in record.error
    assert not record.applied


def test_a_projection_that_knows_the_inputs_changes_the_outputs_less():
    model = Net().eval()
    one = {"structure": "low-rank", "budget": 9.0, "share": 0.25}
    assert replaced(model, **one)[1].change < 0.6 * replaced(model, aware=False, **one)[1].change


def test_steps_of_distillation_never_make_it_worse():
    model = Net().eval()
    one = {"structure": "block-diagonal-low-rank", "budget": 9.0, "share": 0.5}
    assert replaced(model, steps=20, **one)[1].change <= 1.001 * replaced(model, **one)[1].change


def test_the_same_seed_makes_the_same_model():
    one = {"structure": "monarch|low-rank", "budget": 0.2, "seed": 3, "share": 0.25}
    a, b = [replaced(Net().eval(), **one)[0].state_dict() for _ in range(2)]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


# -- what is left alone ----------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, written_out=False):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp, self.written_out = nn.Linear(WIDTH, WIDTH), written_out

    def forward(self, x):
        q, k, v = (t.view(1, -1, 2, WIDTH // 2).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        if self.written_out:
            y = (q @ k.transpose(-1, -2) / 4).softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return self.mlp(x + self.out(y.transpose(1, 2).flatten(2)[0])) + x.tanh()


@thinned(2, passes=[(), ("fuse-attention",)], written_out=[False, True])
def test_attention_outputs_are_replaced_on_request(written_out, passes):
    model = Attention(written_out).eval()
    one = {"structure": "low-rank", "budget": 9.0, "passes": passes}
    record = replaced(model, **one)[1]
    assert {s.path for s in record.applied} == {"qkv", "mlp"}
    assert whys(record) == {"out": "it is one of the attention-outputs"}
    (site,) = record.refused
    assert site.change == "also=attention-outputs"
    assert len(replaced(model, also="attention-outputs", **one)[1].applied) == 3


def test_heads_are_replaced_on_request():
    record = replaced(Net().eval(), also="heads", structure="low-rank", budget=9.0)[1]
    assert {s.path for s in record.applied} == {"up", "down", "head"}


class Words(nn.Module):
    def __init__(self, tied=False, padding=None):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.mix = nn.Embedding(40, WIDTH, padding_idx=padding), nn.Linear(WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 40, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        return self.head(self.norm(x + self.mix(x)))


IDS = [(torch.randint(40, (2, 7), generator=torch.Generator().manual_seed(i)),) for i in range(8)]


def test_embeddings_are_replaced_on_request_by_low_rank_factors():
    model = Words().eval()
    model.table.weight.data = torch.randn(40, 3) @ torch.randn(3, WIDTH)
    one = {"calibration": IDS, "also": "embeddings", "where": "table", "budget": "change<=1e-4"}
    fast, record = replaced(model, structure="low-rank", **one)
    assert [s.path for s in record.applied] == ["table"]
    torch.testing.assert_close(fast(*IDS[0]), model(*IDS[0]), rtol=1e-4, atol=1e-4)
    state = fast.state_dict()
    torch.testing.assert_close(state["table.weight"], model.table.weight.data)
    assert fast.verify().ok
    record = replaced(model, structure="monarch", **one)[1]
    assert whys(record)["table"].startswith("none of the forms that were asked for can be looked up")
    record = replaced(model, **{**one, "also": ""}, structure="low-rank")[1]
    assert whys(record) == {"table": "it is one of the embeddings"}


def test_a_table_that_is_also_the_head_is_replaced_once_and_stays_one_in_the_state_dict(tmp_path):
    model = Words(tied=True).eval()
    model.table.weight.data = torch.randn(40, 3) @ torch.randn(3, WIDTH)
    one = {"calibration": IDS, "also": "embeddings|heads", "where": "table|head", "budget": "change<=1e-4"}
    fast, record = replaced(model, structure="low-rank", **one)
    assert [s.path for s in record.applied] == ["table", "head"]
    torch.testing.assert_close(fast(*IDS[0]), model(*IDS[0]), rtol=1e-4, atol=1e-4)
    names = {n for n, _ in fast.named_parameters()} - {n for n, _ in model.named_parameters()}
    assert {n.partition("_")[2] for n in names} == {"down", "up"}
    assert len(names) == 2
    assert not {"table.weight", "head.weight"} & {n for n, _ in fast.named_parameters()}
    for name, value in fast.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    fast.load_state_dict(model.state_dict())
    torch.testing.assert_close(fast(*IDS[0]), model(*IDS[0]), rtol=1e-4, atol=1e-4)
    model.train(), fast.train()  # another capture, of the tied model that is given back
    torch.testing.assert_close(fast(*IDS[0]), model(*IDS[0]), rtol=1e-4, atol=1e-4)
    fast.eval().save(tmp_path / "words.fxa")
    loaded = fxaccel.load(tmp_path / "words.fxa")
    torch.testing.assert_close(loaded(*IDS[0]), fast(*IDS[0]))
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_a_padding_row_of_a_table_that_trains_keeps_the_table():
    one = {"calibration": IDS, "also": "embeddings", "structure": "low-rank", "budget": 9.0}
    record = replaced(Words(padding=0), **one)[1]
    assert whys(record)["table"] == "row 0 of its table is padding, which has no gradient"
    with torch.no_grad():
        assert {s.path for s in replaced(Words(padding=0), **one)[1].applied} == {"table", "mix"}


class Odd(nn.Module):
    """Linears that cannot be replaced."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.scaled, self.read = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.kept, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        x = x + F.linear(x, self.scaled.weight * 2)
        x = x + self.read(x) * self.read.weight.mean()
        return self.norm(self.kept(x)), self.kept.weight


def test_what_cannot_be_replaced_is_told_with_the_reason():
    record = replaced(Odd().eval(), structure="low-rank", budget=9.0)[1]
    assert sorted(s.why.split(" at ")[0] for s in record.refused) == [
        "its weight is also an output of the model",
        "its weight is also read by aten.mean.dim",
        "its weight is computed, not a parameter of the model",
    ]
    record = replaced(Words(tied=True).eval(), calibration=IDS, structure="low-rank", budget=9.0)[1]
    assert whys(record)["table"] == "it is one of the heads and embeddings"
    assert record.refused[0].change == "also=heads|embeddings"
    tiny = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)).eval()
    record = replaced(tiny, calibration=[(torch.randn(3, 2),)], structure="monarch", share=0.1)[1]
    assert whys(record)["0"] == "a weight of 2 x 2 has no such form of fewer parameters"


def test_what_does_not_pay_in_time_stays_with_the_figures(monkeypatch):
    def least(runs, device, rounds=5):
        return [1.0, *[0.96 if len(runs) == 2 else 0.5 + 0.46 * i for i in range(len(runs) - 1)]]

    monkeypatch.setattr(_linear_fits, "least", least)
    one = {"structure": "low-rank", "budget": 9.0, "even_if_slower": False}
    record = replaced(Net().eval(), share=0.25, **one)[1]
    assert not record.applied
    assert whys(record)["up"] == (
        "nothing pays at 64 x 32 and 48 rows, expected 1.05 times as fast: low-rank(5) is 1.04 times as "
        "fast (0.96 ms for 1)"
    )
    record = replaced(Net().eval(), **one)[1]
    assert {s.why.split(",")[0] for s in record.applied} == {
        "low-rank(10): 2.00 times as fast (0.5 ms for 1)"
    }


def test_times_are_those_of_the_calls_rows_and_of_training():
    """A real measurement, of a size where the answer is beyond doubt."""
    model = nn.Sequential(nn.Linear(1024, 1024), nn.LayerNorm(1024)).eval()
    given = [(torch.randn(64, 1024),)]
    one = {"structure": "low-rank", "budget": 9.0, "share": 0.0625, "even_if_slower": False, "aware": False}
    for train in (False, True):
        with torch.set_grad_enabled(train):
            record = replaced(model, calibration=given, **one)[1]
        (site,) = record.applied
        assert float(site.why.split(": ")[1].split(" times")[0]) > 1.5


# -- parameters ------------------------------------------------------------------------------------


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is [inputs, outputs]."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.randn(inputs, outputs) / 6),
            nn.Parameter(torch.randn(outputs)),
        )

    def forward(self, x):
        return torch.addmm(self.bias, x, self.weight)


def test_a_transposed_weight_comes_back_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(WIDTH, 48), nn.LayerNorm(48)).eval()
    model[0].weight.data = torch.randn(WIDTH, 4) @ torch.randn(4, 48)
    fast, record = replaced(model, structure="low-rank", budget="change<=1e-4")
    assert len(record.applied) == 1
    torch.testing.assert_close(fast(*calls(1)[0]), model(*calls(1)[0]), rtol=1e-4, atol=1e-4)
    assert fast.state_dict()["0.weight"].shape == (WIDTH, 48)
    torch.testing.assert_close(fast.state_dict()["0.weight"], model[0].weight.data, rtol=1e-4, atol=1e-4)
    other = torch.randn(WIDTH, 4) @ torch.randn(4, 48)
    fast.load_state_dict({**model.state_dict(), "0.weight": other})
    torch.testing.assert_close(fast.state_dict()["0.weight"], other, rtol=1e-4, atol=1e-4)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        return self.norm(self.linear(torch.relu(self.linear(x))))


def test_a_layer_called_twice_is_fitted_to_both_inputs_and_replaced_at_both():
    fast, record = replaced(Twice().eval(), structure="low-rank", budget=9.0, share=0.25)
    assert len(record.applied) == 2
    assert record.plan.startswith("1 weights change")
    assert [n for n, _ in fast.named_parameters() if "weight_" in n] == [
        "linear.weight_down", "linear.weight_up"
    ]  # fmt: skip


@pytest.fixture
def structured():
    model = Net().eval()
    return model, *replaced(model, structure="monarch|low-rank", budget=9.0, share=0.25)


def test_the_state_dict_is_a_dense_checkpoint_of_the_same_function(structured):
    model, fast, _ = structured
    other = Net(seed=1).eval()
    state = fast.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in model.state_dict().items()}
    other.load_state_dict(state)
    (x,) = calls(1, seed=3)[0]
    torch.testing.assert_close(other(x), fast(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what came from the factors goes back into them
        fast.load_state_dict(state)
    torch.testing.assert_close(other(x), fast(x))


def test_a_dense_checkpoint_is_projected_and_the_error_said(structured):
    model, fast, _ = structured
    with pytest.warns(UserWarning, match=r"2 tensors .* projected: \w+.weight is off by 0\.\d+ of its norm"):
        fast.load_state_dict(model.state_dict())
    weight, got = model.up.weight.data, fast.state_dict()["up.weight"]
    error = float((got - weight).norm() / weight.norm())
    best = session(fast).replacements[0].forward.form
    assert error == pytest.approx(best.error(weight, best.fit(weight)), rel=1e-3)
    assert torch.equal(fast.state_dict()["head.weight"], model.head.weight)


def test_factors_train_and_other_modes_use_the_same(structured):
    fast = structured[1]
    fast.train()
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.05)
    (x,) = calls(1)[0]
    losses = [train_step(fast, optimizer, x) for _ in range(5)]
    assert losses[-1] < losses[0]
    before = dict(fast.named_parameters())
    fast.eval()
    with torch.no_grad():
        got = fast(x)
    after = dict(fast.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[k] is after[k] for k in before)
    again = fast.report().captures[-1].passes[-1]
    assert "as in an earlier capture" in fast.report().captures[0].passes[-1].plan + again.plan
    dense = Net().eval()
    dense.load_state_dict(fast.state_dict())
    torch.testing.assert_close(got, dense(x))


def test_a_capture_that_cannot_use_what_is_in_place_says_so(structured):
    _, fast, _ = structured
    plain = fxaccel.accelerate(Net().eval(), passes=[])
    plain.__dict__["_fxaccel"].replacements = session(fast).replacements
    for linear, name in ((plain.up, "up"), (plain.down, "down")):
        del linear._parameters["weight"]
        for key, value in dict(fast.named_parameters()).items():
            if key.startswith(f"{name}.weight_"):
                linear._parameters[key.partition(".")[2]] = value
    with pytest.raises(CaptureError, match=r"which replace-linear has replaced in an earlier capture"):
        plain(*calls(1)[0])


def test_copies_pickles_and_files_keep_the_factors(structured, tmp_path):
    model, fast, _ = structured
    (x,) = calls(1, seed=4)[0]
    want = fast(x)
    torch.testing.assert_close(copy.deepcopy(fast)(x), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(x), want)
    fast.save(tmp_path / "m.fxa")
    again = fxaccel.load(tmp_path / "m.fxa")
    assert torch.equal(again(x), want)
    assert again.state_dict().keys() == fast.state_dict().keys()
    with pytest.warns(UserWarning, match="projected"):
        again.load_state_dict(model.state_dict())
    with pytest.warns(UserWarning, match="projected"):
        fast.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), fast(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype):
    model = Net(STRUCTURES["low-rank"]).to(dtype).eval()
    given = [(x.to(dtype),) for (x,) in calls(8)]
    fast, record = replaced(model, calibration=given, structure="low-rank", budget=0.05)
    assert len(record.applied) == 2
    assert {p.dtype for p in fast.parameters()} == {dtype}


def test_the_users_model_is_left_alone():
    model = Net().eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    replaced(model, structure="monarch", budget=9.0)
    assert {n for n, _ in model.named_parameters()} == set(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# -- from scratch ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["low-rank", "butterfly", "radix-2-butterfly", "block-diagonal-low-rank"])
def test_random_factors_have_the_variance_of_the_weights(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 128, bias=False), nn.LayerNorm(128))
    given = [(torch.randn(16, 128),)]
    fast, record = replaced(model, calibration=given, structure=kind, init="random", share=0.5)
    assert len(record.applied) == 1
    assert "to be trained from scratch" in record.plan
    dense = fast.state_dict()["0.weight"]
    assert float(dense.detach().var()) == pytest.approx(float(model[0].weight.detach().var()), rel=0.25)
    other = replaced(model, calibration=given, structure=kind, init="random", share=0.5, seed=1)[0]
    assert not torch.equal(other.state_dict()["0.weight"], dense)


def test_training_from_scratch_learns():
    torch.manual_seed(0)
    model = Net()
    fast = replaced(model, structure="butterfly", init="random", share=0.5)[0]
    optimizer = torch.optim.Adam(fast.parameters(), lr=0.01)
    x, labels = torch.randn(64, WIDTH), torch.randint(10, (64,))
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(fast(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"structure": "circulant"}, "structure names 'circulant', expected some of low-rank, monarch"),
        ({"also": "tails"}, "also names 'tails', expected some of attention-outputs, heads, embeddings"),
        ({"init": "zeros"}, "init is 'zeros', expected 'weights' or 'random'"),
        ({"share": 1.5}, "share is 1.5, expected a number from 0 to 1"),
        ({"budget": "kl<0.1"}, "the budget is 'kl<0.1', expected a metric and its limit"),
    ],
)
def test_wrong_options_are_errors(options, words):
    with pytest.raises(OptionError) as error:
        ReplaceLinear(**options)
    assert words in str(error.value)


def test_it_needs_leave_and_does_not_run_by_default():
    assert not ReplaceLinear.default
    record = replaced(Net().eval(), allow="reassociated")[1]
    assert "it is of class 'approximate' and allow='reassociated'" in record.error


def test_without_calibration_the_captured_call_decides_and_the_plan_says_so():
    record = replaced(Net().eval(), calibration=[], example=calls(1)[0], structure="low-rank", budget=0.2)[1]
    assert "on the captured call, the only one there was" in record.plan
    record = replaced(Net().eval(), calibration=calls(3), structure="low-rank", budget=0.2)[1]
    assert "none was held out, and nothing says that it holds elsewhere" in record.plan


def test_weights_that_are_not_finite_are_an_error_that_names_them():
    model = Net().eval()
    model.up.weight.data[0, 0] = torch.nan
    record = replaced(model, structure="low-rank")[1]
    assert "up.weight holds values that are not finite, expected finite ones" in record.error
