"""A pass that puts parameters in the place of others: state_dict, training, modes, copies, files."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.effects import flowing
from fxaccel.ir import is_call
from fxaccel.passes import MergeLinears
from tests.helpers import session, targets, train_step

aten = torch.ops.aten


MERGE = MergeLinears(fold=True, even_if_slower=True)


class QKV(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width // 2, bias=False)
        self.v = nn.Linear(width, width // 2, bias=False)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.out(self.drop(torch.cat([k.tanh(), v], -1) * q.sigmoid()))


@pytest.fixture
def merged():
    model = QKV().eval()
    x = torch.randn(3, 8)
    return model, fxaccel.accelerate(model, passes=[MERGE], example_inputs=(x,)), x


def test_replaced_parameters_compute_the_same_with_one_linear_less(merged):
    model, fast, x = merged
    torch.testing.assert_close(fast(x), model(x))
    assert targets(session(fast).all[0].program).count("aten.linear.default") == 2
    assert "q_k_v_weight" in dict(fast.named_parameters())
    assert "q.weight" not in dict(fast.named_parameters())
    assert fast.report()["merge-linears"].plan == "8 + 4 + 4 outputs of %x; 0 linears stay"


def test_the_state_dict_stays_that_of_the_original(merged):
    model, fast, x = merged
    want, got = model.state_dict(), fast.state_dict()
    assert set(got) == set(want)
    assert all(torch.equal(got[k], want[k]) for k in want)
    other = QKV().eval()
    fast.load_state_dict(other.state_dict())
    torch.testing.assert_close(fast(x), other(x))
    model.load_state_dict(fast.state_dict())
    torch.testing.assert_close(model(x), other(x))


def test_training_with_replaced_parameters_takes_the_same_path(merged):
    model, fast, x = merged
    model = copy.deepcopy(model)  # out.weight is shared, and would be stepped twice
    ours = torch.optim.AdamW(fast.parameters(), lr=0.05)
    theirs = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = [(train_step(fast, ours, x), train_step(model, theirs, x)) for _ in range(5)]
    assert losses[0][0] > losses[-1][0]
    for a, b in losses:
        assert a == pytest.approx(b, rel=1e-4)
    torch.testing.assert_close(fast.state_dict()["k.weight"], model.state_dict()["k.weight"])


def test_replaced_parameters_that_were_frozen_stay_frozen():
    model = QKV().eval()
    for linear in (model.q, model.k, model.v):
        linear.weight.requires_grad_(False)
    fast = fxaccel.accelerate(model, passes=[MERGE], example_inputs=(torch.randn(3, 8),))
    assert not dict(fast.named_parameters())["q_k_v_weight"].requires_grad
    assert fast.out.weight.requires_grad
    program = session(fast).all[0].program
    assert {n.name for n in program.facts(flowing)} == {"p_out_weight", "p_out_bias", "linear_3"}


def test_gradients_flow_to_parameters_in_the_place_of_others(merged):
    program = session(merged[1]).all[0].program
    assert program.state_node("q_k_v_weight") in program.facts(flowing)
    linears = [n for n in program.graph.nodes if is_call(n, aten.linear.default)]
    assert len(linears) == 2
    assert program.facts(flowing).issuperset(linears)


def test_a_second_mode_captured_later_uses_the_same_replaced_parameters(merged):
    model, fast, x = merged
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    train_step(fast, optimizer, x)  # the merged weight is now ahead of the original's
    before = dict(fast.named_parameters())["q_k_v_weight"]
    fast.train()
    torch.manual_seed(1)
    got = fast(x)
    assert dict(fast.named_parameters())["q_k_v_weight"] is before
    model.load_state_dict(fast.state_dict())
    model.train()
    torch.manual_seed(1)
    torch.testing.assert_close(got, model(x))
    assert len(fast.report().captures) == 2


def test_replaced_parameters_survive_deepcopy_pickle_half_and_save(merged, tmp_path):
    model, fast, x = merged
    want = model(x)
    torch.testing.assert_close(copy.deepcopy(fast)(x), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(fast))(x), want)
    fast.save(tmp_path / "model.fxa")
    again = fxaccel.load(tmp_path / "model.fxa")
    torch.testing.assert_close(again(x), want)
    assert set(again.state_dict()) == set(model.state_dict())
    other = QKV().eval()
    again.load_state_dict(other.state_dict())
    torch.testing.assert_close(again(x), other(x))
    wide = copy.deepcopy(fast).double()
    torch.testing.assert_close(wide(x.double()), copy.deepcopy(model).double()(x.double()))


def test_the_original_keeps_its_own_parameters(merged):
    model, fast, _ = merged
    assert set(dict(model.named_parameters())) == {
        "q.weight", "k.weight", "v.weight", "out.weight", "out.bias"
    }  # fmt: skip
    assert model.out.weight is fast.out.weight
