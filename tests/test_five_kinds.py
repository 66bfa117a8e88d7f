"""One throwaway pass of each kind that later issues bring: the design carries all five.

A local rule; a whole-graph analysis that feeds a rule; a rewrite that replaces parameters; a planner
that wraps regions; a partitioner that cuts the graph in two.
"""

import copy
import functools
import operator
import pickle
from collections import defaultdict
from dataclasses import dataclass

import networkx as nx
import pytest
import torch
from torch import fx, nn
from torch.autograd.graph import saved_tensors_hooks

import fxaccel
from fxaccel.emit import emit
from fxaccel.ir import Program, Region, Replacement, is_call, path

aten = torch.ops.aten


def session(fast):
    return fast.__dict__["_fxaccel"]


def targets(program):
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def train_step(model, optimizer, x):
    optimizer.zero_grad()
    loss = model(x).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


# -- 1. a local rule -------------------------------------------------------------------------------


class GeluByErf(fxaccel.Rule):
    """gelu(x) becomes its definition."""

    name = "gelu-by-erf"

    def pattern(self, op, x):
        return op.aten.gelu.default(x)

    def refuse(self, m):
        if m.val("x").shape[-1] < 8:
            yield f"it is only {m.val('x').shape[-1]} wide"

    def rewrite(self, op, m):
        half = op.aten.mul.Tensor(m.x, 0.5)
        erf = op.aten.erf.default(op.aten.mul.Tensor(m.x, 0.5**0.5))
        return op.aten.mul.Tensor(half, op.aten.add.Tensor(erf, 1.0))


class TwoWidths(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 16), nn.Linear(16, 4)

    def forward(self, x):
        return nn.functional.gelu(self.narrow(nn.functional.gelu(self.wide(x))))


def test_a_local_rule_rewrites_its_sites_and_says_why_it_left_others():
    model, x = TwoWidths(), torch.randn(3, 4)
    fast = fxaccel.accelerate(model, passes=[GeluByErf])
    torch.testing.assert_close(fast(x), model(x))
    record = fast.report()["gelu-by-erf"]
    assert len(record.applied) == 1
    assert [s.why for s in record.refused] == ["it is only 4 wide"]
    assert "aten.erf.default" in targets(session(fast).all[0].program)
    assert fast.verify().ok


# -- 2. a whole-graph analysis that feeds a rule ---------------------------------------------------

calls_of_bottlenecks = []


def bottlenecks(program):
    """Nodes that every path from an input to the output goes through: dominators of the output."""
    calls_of_bottlenecks.append(len(program.graph.nodes))
    graph = nx.DiGraph((a, n) for n in program.graph.nodes for a in n.all_input_nodes)
    graph.add_edges_from(("start", n) for n in program.graph.nodes if n.name in program.inputs)
    reached = nx.immediate_dominators(graph, "start")
    found, node = set(), program.graph.output_node()
    while node != "start":
        found.add(node)
        node = reached[node]
    return found


class SiluAtBottlenecks(fxaccel.Rule):
    """silu(x) becomes x * sigmoid(x) where all data flows through it."""

    name = "silu-at-bottlenecks"

    def pattern(self, op, x):
        return op.aten.silu.default(x)

    def refuse(self, m):
        if m.root not in m.facts(bottlenecks):
            yield "data also flows around it"

    def rewrite(self, op, m):
        return op.aten.mul.Tensor(m.x, op.aten.sigmoid.default(m.x))


class Residual(nn.Module):
    def forward(self, x):
        y = nn.functional.silu(x)  # around this one goes the residual
        z = nn.functional.silu(x * 2 + y)
        return nn.functional.silu(z.sum(-1))


def test_an_analysis_of_the_whole_graph_feeds_a_rule_and_is_computed_once_a_graph():
    calls_of_bottlenecks.clear()
    model, x = Residual(), torch.randn(3, 4)
    fast = fxaccel.accelerate(model, passes=[SiluAtBottlenecks])
    torch.testing.assert_close(fast(x), model(x))
    record = fast.report()["silu-at-bottlenecks"]
    assert (len(record.applied), len(record.refused)) == (2, 1)
    assert record.refused[0].why == "data also flows around it"
    # once for the captured graph, and again after each of the two rewrites, but not for each site
    assert len(calls_of_bottlenecks) <= 3


def test_facts_are_forgotten_when_the_graph_changes():
    fast = fxaccel.accelerate(Residual(), passes=[], example_inputs=(torch.randn(3, 4),))
    program = session(fast).all[0].program
    calls_of_bottlenecks.clear()
    assert program.facts(bottlenecks) is program.facts(bottlenecks)
    program.changed()
    program.facts(bottlenecks)
    assert len(calls_of_bottlenecks) == 2


# -- 3. a rewrite that replaces parameters ---------------------------------------------------------


def joined(*parts):
    return (torch.cat(parts),)


def parted(sizes, whole):
    return tuple(whole.split(sizes))


@dataclass(frozen=True)
class Merges:
    """Groups of linears over one input, by the names of their weights."""

    groups: tuple[tuple[str, ...], ...]


class MergeLinears(fxaccel.Pass):
    """Linears without bias that read one value become one linear with their weights below each other."""

    name = "merge-linears-for-test"

    def plan(self, program):
        readers = defaultdict(list)
        for node in program.graph.nodes:
            if is_call(node, aten.linear.default) and self.covers(node):
                readers[node.args[0]].append(program.state[node.args[1].name].name)
        return Merges(tuple(tuple(names) for names in readers.values() if len(names) > 1))

    def apply(self, program, plan, driver):
        for names in plan.groups:
            weights = [program.state_node(n) for n in names]
            vals = [w.meta["val"] for w in weights]
            sizes = [v.shape[0] for v in vals]
            with vals[0].fake_mode:
                whole = torch.empty(sum(sizes), vals[0].shape[1], dtype=vals[0].dtype)
            one = Replacement(
                self.name, names, (names[0].replace(".", "_") + "_and_others",),
                joined, functools.partial(parted, sizes),
            )  # fmt: skip
            (merged,) = program.replace_parameters(one, [whole])
            linears = [next(iter(w.users)) for w in weights]
            first = min(linears)
            with program.graph.inserting_before(first):
                product = driver.call(first, aten.linear.default, first.args[0], merged)
                parts = driver.call(first, aten.split_with_sizes.default, product, sizes, -1)
                for i, linear in enumerate(linears):
                    part = driver.call(linear, operator.getitem, parts, i)
                    driver.applied(linear, "merged")
                    linear.replace_all_uses_with(part)
                    program.graph.erase_node(linear)


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
    return model, fxaccel.accelerate(model, passes=[MergeLinears], example_inputs=(x,)), x


def test_replaced_parameters_compute_the_same_with_one_linear_less(merged):
    model, fast, x = merged
    torch.testing.assert_close(fast(x), model(x))
    assert targets(session(fast).all[0].program).count("aten.linear.default") == 2
    assert "q_weight_and_others" in dict(fast.named_parameters())
    assert "q.weight" not in dict(fast.named_parameters())
    assert (
        fast.report()["merge-linears-for-test"].plan
        == "Merges(groups=(('q.weight', 'k.weight', 'v.weight'),))"
    )


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
    fast = fxaccel.accelerate(model, passes=[MergeLinears], example_inputs=(torch.randn(3, 8),))
    assert not dict(fast.named_parameters())["q_weight_and_others"].requires_grad
    assert fast.out.weight.requires_grad


def test_a_second_mode_captured_later_uses_the_same_replaced_parameters(merged):
    model, fast, x = merged
    optimizer = torch.optim.SGD(fast.parameters(), lr=0.1)
    train_step(fast, optimizer, x)  # the merged weight is now ahead of the original's
    before = dict(fast.named_parameters())["q_weight_and_others"]
    fast.train()
    torch.manual_seed(1)
    got = fast(x)
    assert dict(fast.named_parameters())["q_weight_and_others"] is before
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


# -- 4. a planner that wraps regions ---------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoints:
    """Module paths whose values are recomputed in backward."""

    paths: tuple[str, ...]


class CheckpointLayers(fxaccel.Pass):
    """Recompute the values of every other layer."""

    name = "checkpoint-layers"
    step = "plan"
    numerics = "bitwise"
    serves = ("training",)

    def plan(self, program):
        layers = dict.fromkeys(
            ".".join(path(n).split(".")[:2]) for n in program.graph.nodes if path(n).startswith("layers.")
        )
        return Checkpoints(tuple(layers)[::2])

    def apply(self, program, plan, driver):
        for i, prefix in enumerate(plan.paths):
            nodes = [
                n
                for n in program.graph.nodes
                if n.op == "call_function" and f"{path(n)}.".startswith(f"{prefix}.")
            ]
            for node in nodes:
                node.meta["regions"] = (*node.meta["regions"], Region("checkpoint", i))
            driver.applied(nodes[0], f"{len(nodes)} nodes recomputed")


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.down(self.drop(nn.functional.gelu(self.up(x)))))


class Deep(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def gradients(model, x, seed=5):
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(x)
    loss.backward()
    return loss, [p.grad.clone() for p in model.parameters()]


def saved_bytes(model, x):
    """Bytes that autograd keeps for backward, each storage once, without the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        loss = model(x)
    total = sum(size for size, _ in seen.values())
    del loss
    return total


def test_a_planner_wraps_regions_gradients_are_bit_equal_and_less_is_saved():
    model, x = Deep().train(), torch.randn(16, 8)
    plain = fxaccel.accelerate(model, passes=[], example_inputs=(x,))
    fast = fxaccel.accelerate(model, passes=[CheckpointLayers])
    want_loss, want = gradients(model, x)
    got_loss, got = gradients(fast, x)
    assert torch.equal(want_loss, got_loss)
    assert all(torch.equal(a, b) for a, b in zip(want, got, strict=True))  # dropout masks are redrawn
    assert fast.report()["checkpoint-layers"].plan == "Checkpoints(paths=('layers.0', 'layers.2'))"
    assert fast.code.count("use_reentrant=False") == 2
    assert saved_bytes(fast, x) < 0.6 * saved_bytes(plain, x)


def test_checkpointed_dropout_draws_new_masks_at_each_call():
    fast, x = fxaccel.accelerate(Deep().train(), passes=[CheckpointLayers]), torch.randn(16, 8)
    assert not torch.equal(gradients(fast, x, 1)[0], gradients(fast, x, 2)[0])


def test_a_pass_for_training_stays_out_of_a_capture_for_inference():
    fast = fxaccel.accelerate(Deep().eval(), passes=[CheckpointLayers])
    with torch.no_grad(), pytest.warns(UserWarning, match="applied nowhere"):
        fast(torch.randn(4, 8))
    assert "serves training only" in fast.report()["checkpoint-layers"].error


# -- 5. a partitioner that cuts the graph in two ---------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """After which node the graph is cut, and how many elements cross."""

    after: str
    elements: int


class PartitionInTwo(fxaccel.Pass):
    """Label the nodes of the first and of the second half of the graph."""

    name = "partition-in-two"
    step = "plan"
    numerics = "bitwise"

    def plan(self, program):
        body = [n for n in program.graph.nodes if n.op == "call_function"]
        middle = range(len(body) // 4, 3 * len(body) // 4)
        cost, _, name = min((crossing_size(body, i + 1), i, body[i].name) for i in middle)
        return Cut(name, cost)

    def apply(self, program, plan, driver):
        stage = 0
        for node in program.graph.nodes:
            if node.op != "call_function":
                continue
            node.meta["regions"] = (Region("stage", stage), *node.meta["regions"])
            if node.name == plan.after:
                driver.applied(node, "cut here")
                stage = 1


def crossing(body, at):
    """Values made before `at` and read from there on."""
    first = set(body[:at])
    return [n for n in body[:at] if any(u not in first for u in n.users)]


def crossing_size(body, at):
    hints = [n.meta["val"] for n in crossing(body, at)]
    return sum(int(v.numel()) if isinstance(v, torch.Tensor) else 1 for v in hints)


def cut(program):
    """Two Programs, the second of which reads what the first returns."""
    halves = []
    crossed = []
    for stage in (0, 1):
        half = program.copy()
        nodes = {n.name: n for n in half.graph.nodes}
        inside = [n for n in half.graph.nodes if Region("stage", stage) in n.meta.get("regions", ())]
        if stage == 0:
            crossed = [
                n.name
                for n in crossing([n for n in half.graph.nodes if n.op == "call_function"], len(inside))
            ]
            half.graph.output_node().args = (tuple(nodes[n] for n in crossed),)
        else:
            first = next(iter(half.graph.nodes))
            for name in crossed:
                with half.graph.inserting_before(first):
                    new = half.graph.placeholder(f"from_{name}")
                new.meta = dict(nodes[name].meta, regions=())
                nodes[name].replace_all_uses_with(new)
            half.inputs = (*[n for n in half.inputs if n], *(f"from_{n}" for n in crossed))
        for node in reversed(list(half.graph.nodes)):
            if node.op == "call_function" and node not in inside:
                half.graph.erase_node(node)
        half.drop_unused_state()
        half.graph.lint()
        halves.append(half)
    return halves


def test_a_partitioner_cuts_the_graph_and_the_halves_in_turn_are_the_whole():
    model, x = Deep().eval(), torch.randn(6, 8)
    fast = fxaccel.accelerate(model, passes=[PartitionInTwo], example_inputs=(x,))
    program = session(fast).all[0].program
    first, second = (emit(p) for p in cut(program))
    for batch in (6, 3):
        x = torch.randn(batch, 8)
        passed = first.bind(fast, "<first>")["forward"](x)
        (got,) = second.bind(fast, "<second>")["forward"](x, *passed)
        assert torch.equal(got, fast(x))
        torch.testing.assert_close(got, model(x))
    assert "layers.0" in first.source
    assert "layers.3" not in first.source
    assert "layers.0" not in second.source
    assert "stage[0]" in fast.code
    assert "stage[1]" in fast.code


def test_gradients_flow_through_both_halves():
    model, x = Deep().eval(), torch.randn(6, 8)
    fast = fxaccel.accelerate(model, passes=[PartitionInTwo], example_inputs=(x,))
    _, want = gradients(model, x)
    first, second = (emit(p).bind(fast, "<half>") for p in cut(session(fast).all[0].program))
    model.zero_grad()
    passed = first["forward"](x)
    boundary = [v.detach().requires_grad_() for v in passed]
    (loss,) = second["forward"](x, *boundary)
    loss.backward()
    torch.autograd.backward(passed, [b.grad for b in boundary])
    for parameter, grad in zip(model.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_the_labels_of_a_stage_are_in_the_listing_and_in_the_saved_file(tmp_path):
    fast = fxaccel.accelerate(Deep().eval(), passes=[PartitionInTwo], example_inputs=(torch.randn(6, 8),))
    fast.save(tmp_path / "model.fxa")
    again = fxaccel.load(tmp_path / "model.fxa")
    labels = {r for n in session(again).all[0].program.graph.nodes for r in n.meta.get("regions", ())}
    assert labels == {Region("stage", 0), Region("stage", 1)}
    assert isinstance(session(again).all[0].program, Program)
    assert "stage[1]" in again.code


def test_the_five_passes_run_in_one_pipeline_in_the_order_of_their_steps():
    class Everything(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.deep = QKV(), Deep()

        def forward(self, x):
            return self.deep(nn.functional.silu(self.qkv(x)))

    model, x = Everything().train(), torch.randn(6, 8)
    passes = [PartitionInTwo, CheckpointLayers, MergeLinears, SiluAtBottlenecks, GeluByErf]
    fast = fxaccel.accelerate(model, passes=passes)
    torch.manual_seed(3)
    want = model(x)
    with pytest.warns(UserWarning, match="checkpoint-layers"):  # no path starts with layers.
        fast(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fast(x), want)
    assert list(fast.report()) == [
        "merge-linears-for-test", "silu-at-bottlenecks", "gelu-by-erf", "partition-in-two",
        "checkpoint-layers",
    ]  # fmt: skip
    assert isinstance(session(fast).all[0].program.graph, fx.Graph)
