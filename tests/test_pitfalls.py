"""Ways in which rewriting passes break models without a word, where no other file of tests has them."""

import copy
import dataclasses
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxaccel
from fxaccel.ir import Replacement, is_call
from fxaccel.passes import MergeLinears
from tests.helpers import Method as Function
from tests.helpers import agree, in_pieces, notes, saved_bytes
from tests.test_replaced_parameters import QKV

F = nn.functional
aten = torch.ops.aten


class Block(nn.Module):
    """Pre-norm attention and MLP, attention written out: both default passes fire."""

    def __init__(self, width=8, heads=2, p=0.0):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.first, self.second = nn.RMSNorm(width, eps=1e-6), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(p)

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.first(x)).chunk(3, -1)
        )
        a = (q @ k.mT * self.scale).softmax(-1) @ v
        x = x + self.drop(self.out(a.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.second(x)))))


def programs(fast):
    return [c.program for c in fast.__dict__["_fxaccel"].all]


def fired(fast):
    return {p.name for c in fast.report().captures for p in c.passes if p.applied}


def differentiated(model, x):
    """Output, and the gradients of the input and of every parameter."""
    x = x.detach().requires_grad_()
    out = model(x)
    wanted = [x, *model.parameters()]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), wanted)]


def rule(name, pattern, rewrite):
    """A rule that rewrites a site once."""

    def refuse(self, m):
        if m.root.meta.get("by") == name:
            yield "it is done"

    return type("TheRule", (fxaccel.Rule,), {
        "name": name, "__doc__": "One.", "pattern": pattern, "rewrite": rewrite, "refuse": refuse,
    })  # fmt: skip


# -- views, writes, random numbers -----------------------------------------------------------------


def test_a_norm_beside_writes_keeps_its_values():
    def function(self, x, r):
        h = x + r
        y = self.norm(h)
        h[:, :4].mul_(2)
        return y, self.norm(h), h

    model = Function(function, norm=nn.RMSNorm(8, eps=1e-6))
    agree(model, fxaccel.accelerate(model), torch.randn(2, 8), torch.randn(2, 8))


@pytest.mark.parametrize("copied", [True, False], ids=["a copy becomes the input", "a view becomes a copy"])
def test_an_output_shares_storage_with_an_input_only_where_it_did(copied):
    if copied:
        model = Function(lambda self, x: x.clone())
        one = rule("alias", lambda self, op, x: op.aten.clone.default(x), lambda self, op, m: m.x)
    else:
        model = Function(lambda self, x: x.t())
        one = rule(
            "alias",
            lambda self, op, x: op.aten.permute.default(x, [1, 0]),
            lambda self, op, m: op.aten.clone.default(op.aten.permute.default(m.x, [1, 0])),
        )
    x = torch.randn(3, 4)
    fast = fxaccel.accelerate(model, passes=[one], example_inputs=(x,))
    shared = [m(x).data_ptr() == x.data_ptr() for m in (model, fast)]
    assert shared[0] == shared[1]


def test_a_rewrite_that_draws_random_numbers_does_not_shift_the_masks_of_others():
    def rewrite(self, op, m):
        nothing = op.aten.mul.Tensor(op.aten.rand_like.default(m.x), 0.0)
        return op.aten.add.Tensor(op.aten.tanh.default(m.x), nothing)

    noisy = rule("noisy", lambda self, op, x: op.aten.tanh.default(x), rewrite)
    model = Function(lambda self, x: F.dropout(x.tanh(), 0.5))
    with pytest.warns(UserWarning, match="applied nowhere"):
        agree(model, fxaccel.accelerate(model, passes=[noisy]), torch.randn(30, 4))


def test_training_with_dropout_draws_the_masks_of_the_model():
    model, x = Block(p=0.3).train(), torch.randn(3, 5, 8)
    fast, results = fxaccel.accelerate(model, example_inputs=(x,)), []
    for m in (model, fast):
        torch.manual_seed(4)
        results.append(differentiated(m, x))
    torch.testing.assert_close(*results)
    assert fired(fast) == {"fuse-attention", "fuse-norm"}


# -- shared and replaced parameters ----------------------------------------------------------------


class TiedMerge(MergeLinears):
    """Merges what it finds, tied or not."""

    def refuse(self, program, linear):
        return iter(())


def test_tied_parameters_are_not_replaced_one_by_one():
    model = Function(
        lambda self, x, ids: self.a(x) + self.b(x) + self.e(ids),
        e=nn.Embedding(8, 8), a=nn.Linear(8, 8, bias=False), b=nn.Linear(8, 8, bias=False),
    )  # fmt: skip
    model.b.weight = model.e.weight
    x, ids = torch.randn(3, 8), torch.tensor([1, 2, 3])
    fast = fxaccel.accelerate(model, passes=[TiedMerge(fold=True)])
    with pytest.warns(UserWarning, match="is one tensor with"):
        got = fast(x, ids)
    torch.testing.assert_close(got, model(x, ids))
    assert fast.b.weight is fast.e.weight


class WrongMerge(MergeLinears):
    """The map to the new parameter is wrong, and no proof was asked for."""

    def apply(self, program, plan, driver):
        super().apply(program, plan, driver)
        one = program.replacements[-1]
        program.replacements[-1] = dataclasses.replace(one, forward=lambda *t: (1.5 * torch.cat(t),))


def test_wrongly_replaced_parameters_are_given_back():
    model, x = QKV().eval(), torch.randn(3, 8)
    names = [n for n, _ in model.named_parameters()]
    fast = fxaccel.accelerate(model, passes=[WrongMerge(fold=True, even_if_slower=True)])
    with pytest.warns(UserWarning, match="dropped with all others"):
        torch.testing.assert_close(fast(x), model(x))
    assert [n for n, _ in fast.named_parameters()] == names
    assert all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    fast.train(), model.train()
    torch.manual_seed(0)
    want = model(x)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="applied nowhere"):
        torch.testing.assert_close(fast(x), want)


class Rounds(fxaccel.Pass):
    """Stores the weight of a linear as integers."""

    name = "rounds"
    numerics = "approximate"

    def apply(self, program, plan, driver):
        linear = next(n for n in program.graph.nodes if is_call(n, aten.linear.default))
        weight = program.state_node("weight")
        val = weight.meta["val"]
        with val.fake_mode:
            packed = torch.empty(val.shape, dtype=torch.int8)
        one = Replacement(
            self.name, ("weight",), ("packed",), lambda w: ((w * 16).round().to(torch.int8),), None
        )
        (new,) = program.replace_parameters(one, [packed])
        with program.graph.inserting_before(linear):
            wide = driver.call(linear, aten.to.dtype, new, torch.float32)
            linear.args = (linear.args[0], driver.call(linear, aten.div.Tensor, wide, 16.0), *linear.args[2:])
        driver.applied(linear)


def test_a_parameter_that_becomes_integers_is_no_parameter_to_train():
    model, x = nn.Linear(8, 8), torch.randn(3, 8)
    with torch.no_grad():
        model.weight.copy_((model.weight * 16).round() / 16)
    with torch.no_grad():
        fast = fxaccel.accelerate(model, passes=[Rounds], allow="approximate", example_inputs=(x,))
        torch.testing.assert_close(fast(x), model(x))
    packed = dict(fast.named_parameters())["packed"]
    assert (packed.dtype, packed.requires_grad) == (torch.int8, False)
    assert fast.bias is model.bias
    assert "packed" in fast.state_dict()


def test_a_tensor_that_is_a_plain_attribute_is_read_at_each_call():
    model = Function(lambda self, x: x * self.scale)
    model.scale = torch.tensor(0.5)
    fast, x = fxaccel.accelerate(model), torch.randn(3, 4)
    torch.testing.assert_close(fast(x), x * 0.5)
    model.scale.fill_(2.0)
    torch.testing.assert_close(fast(x), x * 2)
    twin = copy.deepcopy(fast)
    twin.scale.fill_(3.0)
    torch.testing.assert_close((fast(x), twin(x)), (x * 2, x * 3))
    fast.scale = torch.tensor(7.0)
    torch.testing.assert_close(fast(x), x * 7)


# -- bodies, regions, gradients --------------------------------------------------------------------


def test_bodies_that_no_pass_looks_into_are_in_the_report():
    def function(self, x):
        return torch.cond(x.sum() > 0, lambda a: F.layer_norm(a, [4]), lambda a: a * 2, (x,))

    model = Function(function)
    fast = fxaccel.accelerate(model)
    for x in (torch.randn(3, 4).abs(), -torch.randn(3, 4).abs()):
        torch.testing.assert_close(fast(x), model(x))
    assert "cond at helpers.py:" in notes(fast)
    assert "no pass looks into its bodies" in notes(fast)


@pytest.mark.parametrize("around", [torch.no_grad, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_passes_look_into_regions(around):
    def function(self, x):
        with around():
            y = self.norm(x)
        return y.float() * x

    model = Function(function, norm=nn.LayerNorm(8))
    fast = fxaccel.accelerate(model, passes=["fuse-norm"], example_inputs=(torch.randn(3, 8),))
    assert fired(fast) == {"fuse-norm"}


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block(p=0.2) for _ in range(3))

    def forward(self, x):
        for i, layer in enumerate(self.layers):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=i == 1):
                x = checkpoint(layer, x, use_reentrant=False)
        return x.float().square().mean()


def test_checkpoints_of_the_user_stay():
    model, x = Checkpointed(), torch.randn(4, 16, 8, requires_grad=True)
    fast, results = fxaccel.accelerate(model, example_inputs=(x,)), []
    assert not in_pieces(fast)
    assert fast.code.count("use_reentrant=False") == 3
    assert saved_bytes(fast, x) <= 1.1 * saved_bytes(model, x)
    for m in (model, fast):
        torch.manual_seed(3)
        results.append(torch.autograd.grad(m(x), [x, *m.parameters()]))
    for ours, theirs in zip(*results, strict=True):  # two bits of bfloat16, of the largest
        eps = torch.finfo(torch.bfloat16).eps
        assert (ours - theirs).abs().max() <= 4 * eps * theirs.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpoints_are_left_as_they_are_and_that_is_said():
    model = Function(lambda self, x: checkpoint(self.a, x, use_reentrant=True), a=nn.Linear(4, 4))
    fast, x = fxaccel.accelerate(model), torch.randn(3, 4, requires_grad=True)
    grads = []
    for m in (model, fast):
        x.grad = None
        m.zero_grad()
        m(x).square().sum().backward()
        grads.append([x.grad, *(p.grad.clone() for p in m.parameters())])
    torch.testing.assert_close(*grads)
    assert "a piece is left as it was" in notes(fast)


def test_two_calls_and_then_their_backwards_in_either_order():
    model = Block()
    fast, grads = fxaccel.accelerate(model), []
    a, b = torch.randn(2, 5, 8), torch.randn(3, 4, 8)
    for m in (model, fast):
        m.zero_grad()
        first, second = m(a).square().sum(), m(b).square().sum()
        second.backward()
        first.backward()
        grads.append([p.grad.clone() for p in m.parameters()])
    torch.testing.assert_close(*grads)


def second_derivatives(norm, x, weight):
    (g,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), [x, weight])


def test_second_derivatives_are_right_on_the_cpu_and_a_kernel_that_lacks_them_says_so():
    model, x = nn.LayerNorm(8), torch.randn(3, 8, requires_grad=True)
    fast = fxaccel.accelerate(model, measure=False)
    assert (fast(x), fired(fast))[1]
    torch.testing.assert_close(*(second_derivatives(m, x, model.weight) for m in (fast, model)))
    with pytest.raises(NotImplementedError, match="no second derivative"):
        second_derivatives(
            lambda x: torch.ops.fxaccel.layer_norm(x, model.weight, None, 1e-5), x, model.weight
        )


# -- several processes -----------------------------------------------------------------------------

RANK = """
    import sys, torch, fxaccel
    from torch import nn
    rank, store = int(sys.argv[1]), sys.argv[2]
    torch.distributed.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4))
    x = torch.randn(6, 8)
    model(x).square().mean().backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    fast = fxaccel.accelerate(model)
    wrapped = nn.parallel.DistributedDataParallel(fast)
    for _ in range(2):
        fast.zero_grad()
        wrapped(x[3 * rank : 3 * rank + 3]).square().mean().backward()
    for n, p in fast.named_parameters():
        torch.testing.assert_close(p.grad, want[n])
    codes = [None, None]
    torch.distributed.all_gather_object(codes, fast.code)
    assert codes[0] == codes[1]
    print("equal")
"""


@pytest.mark.slow
def test_two_processes_make_one_plan_and_one_gradient(tmp_path):
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(RANK), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path,
        )
        for rank in range(2)
    ]  # fmt: skip
    done = [r.communicate(timeout=120) for r in ranks]
    assert [out.strip() for out, _ in done] == ["equal", "equal"], done


def test_cutting_a_model_into_pieces_is_silent(tmp_path):
    code = """
        import torch, fxaccel
        class M(torch.nn.Module):
            def forward(self, x):
                if x.sum() > 0:
                    return x * int(x.max().item())
                return x
        fast = fxaccel.accelerate(M())
        fast(torch.ones(3, 4)), fast(-torch.ones(3, 4))
        assert "pieces" in str(fast.report())
    """
    script = tmp_path / "cut.py"
    script.write_text(textwrap.dedent(code))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
