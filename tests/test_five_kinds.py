"""One throwaway pass of each kind that later issues bring: the design carries all five.

A local rule; a whole-graph analysis that feeds a rule; a rewrite that replaces parameters; a planner
that wraps regions; a partitioner that cuts the graph in two.
"""

from dataclasses import dataclass

import networkx as nx
import pytest
import torch
from torch import fx, nn

import fxaccel
from fxaccel.emit import emit
from fxaccel.ir import Program, Region, path
from tests.helpers import saved_bytes, session, targets
from tests.test_replaced_parameters import MERGE, QKV

aten = torch.ops.aten


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
    passes = [PartitionInTwo, CheckpointLayers, MERGE, SiluAtBottlenecks, GeluByErf]
    fast = fxaccel.accelerate(model, passes=passes)
    torch.manual_seed(3)
    want = model(x)
    with pytest.warns(UserWarning, match="checkpoint-layers"):  # no path starts with layers.
        fast(x)
    torch.manual_seed(3)
    torch.testing.assert_close(fast(x), want)
    assert list(fast.report()) == [
        "silu-at-bottlenecks", "gelu-by-erf", "partition-in-two", "checkpoint-layers", "merge-linears"
    ]  # fmt: skip
    assert isinstance(session(fast).all[0].program.graph, fx.Graph)
