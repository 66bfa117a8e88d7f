"""use-channels-last: which convolutions read it, where values are laid out anew, that nobody sees it."""

import copy
import warnings

import pytest
import torch
from torch import nn

import fxaccel
from tests.helpers import Function, Method, session, targets
from tests.passes.test_fuse_convolution import LAYOUTS, laid

F, S = nn.functional, nn.Sequential
NAME = "use-channels-last"
X = torch.randn(2, 6, 9, 8)


def relaid(model, *args, passes=(NAME,), grad=False, **options):
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # where it applies nowhere
        fast = fxaccel.accelerate(model, passes=passes, example_inputs=args, **options)
    return fast, fast.report()[NAME]


def agree(model, fast, *args):
    with torch.no_grad():
        got, want = fast(*args), model(*args)
    for a, b in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
        assert laid(a) == laid(b)


class Net(nn.Module):
    """Convolutions with all between them that leaves channels where they are."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(16, 8, 3, padding="same", groups=2)
        self.norm, self.c = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        h = F.silu(self.a(x))
        h = self.norm(self.b(torch.cat([h, F.relu(h)], 1)))
        h = F.interpolate(F.avg_pool2d(F.max_pool2d(h, 2), 2), scale_factor=3)
        return self.c(F.pad(h, (1, 1, 0, 0)))


# -- it fires --------------------------------------------------------------------------------------


def test_values_are_laid_out_once_and_given_back():
    model = Net().eval()
    fast, record = relaid(model, X)
    assert [s.path for s in record.applied] == ["a", "b", "c"]
    assert record.plan == "3 convolutions read channels last"
    program = session(fast).all[0].program
    calls = targets(program)
    assert calls[0] == "aten.contiguous.default"
    assert calls[-2:] == ["aten.conv2d.default", "aten.clone.default"]
    assert sum(c in ("aten.contiguous.default", "aten.clone.default") for c in calls) == 2
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    assert all(n.meta["val"].is_contiguous(memory_format=torch.channels_last) for n in nodes[:-1])
    agree(model, fast, X)
    assert fast.verify().ok


def test_values_in_between_lie_as_the_graph_says():
    """A kernel that gave another layout than its shape function would cost a copy that nobody sees."""
    fast, _ = relaid(Net().eval(), X)
    program = session(fast).all[0].program
    found, run = {}, torch.fx.Interpreter.run_node

    class Run(torch.fx.Interpreter):
        def run_node(self, n):
            found[n.name] = run(self, n)
            return found[n.name]

    state = dict(fast.named_parameters()) | dict(fast.named_buffers())
    holders = program.graph.find_nodes(op="placeholder")
    given = [state[program.state[n.name].name] if n.name in program.state else X for n in holders]
    with torch.no_grad():
        Run(torch.fx.GraphModule(nn.Module(), program.graph)).run(*given)
    for node in program.graph.nodes:
        if node.op == "call_function":
            assert laid(found[node.name]) == list(map(int, _hinted(node.meta["val"])))


def _hinted(val):
    """Strides of a fake value at the captured sizes, where they matter."""
    return [
        s if isinstance(s, int) else s.node.hint
        for s, n in zip(val.stride(), val.shape, strict=True)
        if n != 1
    ]


def test_a_second_run_changes_nothing():
    fast, _ = relaid(Net().eval(), X)
    program = session(fast).all[0].program
    again = fxaccel.manager.run(program.copy(), [fxaccel.passes.UseChannelsLast()]).program
    assert targets(again) == targets(program)


@pytest.mark.parametrize("passes", [("fold-batch-norm", NAME), (NAME, "fuse-convolution", "fold-batch-norm")])
def test_with_others(passes):
    model = Net().eval()
    model.norm.running_var.uniform_(0.5, 2)
    fast, _ = relaid(model, X, passes=passes)
    assert "aten.batch_norm.default" not in targets(session(fast).all[0].program)
    agree(model, fast, X)


def test_volumes():
    model = S(nn.Conv3d(6, 8, 2), nn.ReLU(), nn.Conv3d(8, 4, 1, bias=False)).eval()
    x = torch.randn(2, 6, 4, 3, 5)
    fast, record = relaid(model, x)
    assert len(record.applied) == 2
    agree(model, fast, x)


@pytest.mark.parametrize("name", LAYOUTS)
def test_results_are_laid_out_as_they_were(name):
    model = Method(LAYOUTS[name][0], a=nn.Conv2d(6, 6, 3, padding=1), b=nn.Conv2d(6, 6, 1))
    fast, record = relaid(model, X)
    assert record.applied
    agree(model, fast, X)
    agree(model, fast, X.to(memory_format=torch.channels_last))


def test_training():
    torch.manual_seed(0)
    model = S(nn.Conv2d(6, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1))
    fast, record = relaid(copy.deepcopy(model), X, grad=True)
    assert len(record.applied) == 2
    grads = []
    for one in (model, fast):
        x = X.clone().requires_grad_()
        y = one(x)
        y.square().mean().backward()
        grads.append([y.detach(), x.grad, *(p.grad for p in one.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
        assert laid(a) == laid(b)


# -- it declines -----------------------------------------------------------------------------------

NONE = "convolutions of one dimension and transposed ones take what they are given"
REFUSED = {
    "line": (lambda: (nn.Conv1d(6, 4, 3), X[..., 0]), NONE),
    "transposed": (lambda: (nn.ConvTranspose2d(6, 4, 3), X), NONE),
    "one image": (
        lambda: (nn.Conv2d(6, 4, 3), X[0]),
        "its input has 3 dimensions, without a batch there is no such layout",
    ),
    "float64": (
        lambda: (nn.Conv2d(6, 4, 3).double(), X.double()), "dtype torch.float64 is not one of torch.float32"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_declines_and_says_why(name):
    layer, x = REFUSED[name][0]()
    model = S(layer, nn.ReLU()).eval()
    fast, record = relaid(model, x)
    assert record.applied == []
    assert REFUSED[name][1] in record.refused[0].why
    agree(model, fast, x)


def test_not_beside_a_batch_norm_that_trains():
    model = S(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8))
    _, record = relaid(model, X, grad=True)
    assert record.applied == []
    why = "takes statistics of the batch, which torch sums less exactly on the CPU where channels are last"
    assert why in " ".join(record.refused[0].why.split())


def test_torch_sums_statistics_less_exactly_channels_last():
    """What the refusal says; where this fails, torch has a better kernel and the refusal can go."""
    torch.manual_seed(0)
    x, lost = torch.randn(4, 8, 96, 96) + 1, []
    want = F.batch_norm(x.double(), None, None, training=True)
    for format in (torch.contiguous_format, torch.channels_last):
        y = F.batch_norm(x.contiguous(memory_format=format), None, None, training=True)
        lost.append(float((y - want).abs().max()))
    assert lost[1] > 4 * lost[0]


def test_without_convolutions_nothing_happens():
    _, record = relaid(S(nn.MaxPool2d(2), Function(torch.relu)).eval(), X)
    assert (record.applied, record.refused) == ([], [])


def test_only_where_it_is_asked_for():
    _, record = relaid(Net().eval(), X, passes=(f"{NAME}{{where=b}}",))
    assert [s.path for s in record.applied] == ["b"]
