"""What a refusal says would let a site be taken: it is done, and the site is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxaccel
from fxaccel import discover
from tests.helpers import Function, Method

torch.manual_seed(0)
X, IMAGE = torch.randn(2, 3, 8), torch.randn(2, 6, 8, 8)
Q, K, V = torch.randn(3, 2, 2, 6, 8).unbind(0)
COS, SIN = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, 8, dtype=torch.float64)
LABELS = torch.randint(0, 100, (64,))
SMALLEST = torch.finfo(torch.float32).min
LOWER = torch.ones(6, 6).tril() > 0


def tried(one, model, *args, grad=False):
    """What one pass makes of a model."""
    with torch.set_grad_enabled(grad):
        fast = fxaccel.accelerate(model, [one], example_inputs=args, allow="approximate")
    record = fast.report()[one.name]
    assert record.error == ""
    return record


def advised(text, change):
    """The pass with the options that a change names in the place of its own, or beside them."""
    name, _, options = text.rstrip("}").partition("{")
    words = [*filter(None, options.split(",")), *change.removesuffix(" or more").split("; ")]
    merged = {word.partition("=")[0]: word for word in words}
    return discover.parse(f"{name}{{{','.join(merged.values())}}}")


# -- options ---------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()


def stream():
    """Three norms of a stream, of which two values have a mean of the caller's."""

    def function(s, x, y):
        h = x + s.e(x.sin())
        return s.a(h), s.b(h + y), s.c(s.e(h.cos()) + y)

    return Method(function, e=nn.Linear(8, 8), **{n: nn.LayerNorm(8) for n in "abc"})


OPTIONS = {  # the pass, the model and its inputs -> the change
    "fuse-activation": (lambda: nn.Sequential(nn.Linear(8, 8), nn.GELU()), (X,), "even_if_slower=true"),
    "drop-norm-mean{budget=9}": (lambda: nn.LayerNorm(8), (X,), "even_if_slower=true"),
    "layer-norm-to-rms-norm": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), (X,), "even_if_slower=true"
    ),
    "layer-norm-to-rms-norm{even_if_slower=true}": (stream, (X, X.cos()), "own=2"),
    "merge-linears": (
        lambda: Method(lambda s, x: s.q(x) * s.k(x), q=nn.Linear(8, 8), k=nn.Linear(8, 8)), (X,),
        "even_if_slower=true; fold=true",
    ),
    "merge-linears{even_if_slower=false,fold=true}": (
        lambda: Method(lambda s, x: s.q(x) * s.k(x), q=nn.Linear(8, 8), k=nn.Linear(8, 8)), (X,),
        "even_if_slower=true",
    ),
    "fuse-linear-loss": (
        lambda: Method(lambda s, x, y: F.cross_entropy(s.head(x), y), head=nn.Linear(64, 100)),
        (torch.randn(64, 64), LABELS), "least=25KiB",
    ),
    "pack-weights{mebibytes=0.3}": (
        lambda: nn.Sequential(nn.Linear(256, 512)), (torch.randn(64, 256),), "mebibytes=1 or more"
    ),
    "replace-linear{structure=low-rank,budget=change<=9,even_if_slower=true}": (
        mlp, (torch.randn(8, 64),), "also=heads"
    ),
    "quantize{weights=int8,even_if_slower=true,also=embeddings}": (
        mlp, (torch.randn(8, 64),), "also=embeddings|heads"
    ),
    "smooth-inputs{insert=false}": (
        lambda: nn.Sequential(nn.Sigmoid(), nn.Linear(8, 8)), (X,), "insert=true"
    ),
    "swap-activation{old=relu,new=gelu,budget=change<=9}": (
        lambda: Function(lambda x: torch.relu(x) ** 2), (X,), "old=relu_squared"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize("text", OPTIONS)
def test_with_the_options_that_a_refusal_names_the_site_is_taken(text):
    make, args, change = OPTIONS[text]
    grad = text.startswith(("fuse-activation", "merge"))
    site = tried(discover.parse(text), make(), *args, grad=grad).refused[-1]
    assert site.change == change
    taken = tried(advised(text, change), make(), *args, grad=grad).applied
    assert site.path in {s.path for s in taken}
    assert change not in site.why
    assert str(site).endswith(f"; it would be taken with: {change}")


# -- other models and calls ------------------------------------------------------------------------


def attention(mask):
    return Function(lambda q, k, v, seen: mask(q @ k.mT, seen[:, None, None, :]).softmax(-1) @ v)


def rotated(finish):
    def function(x, cos, sin):
        return finish(x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin)

    return Function(function)


def repeated(count):
    """Four query heads on two of keys, which are repeated so many times ahead."""

    def function(s, x):
        q, k, v = s.qkv(x).reshape(2, 3, 3, 4, 8).permute(2, 0, 3, 1, 4)
        k, v = (t[:, :2].repeat_interleave(count, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, enable_gqa=count == 1)

    return Method(function, qkv=nn.Linear(8, 96))


CONVOLUTION, NORM = nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)
WEIGHT = nn.Parameter(torch.ones(8))
SEEN = torch.rand(2, 6) > 0.3
CHANGES = {  # the change -> the pass, what is refused, what is taken, the inputs
    "a number as eps": (
        "fuse-norm", lambda: nn.RMSNorm(8), lambda: nn.RMSNorm(8, eps=1e-6), (X,),
    ),
    "a norm over the last dimension alone": (
        "fuse-norm", lambda: nn.LayerNorm([3, 8]), lambda: nn.LayerNorm(8), (X,),
    ),
    "the product rounded in its place": (
        "fuse-norm",
        lambda: Function(lambda x: WEIGHT * (x * (x.float().pow(2).mean(-1, True) + 1).rsqrt().bfloat16())),
        lambda: Function(lambda x: WEIGHT * (x.float() * (x.float().pow(2).mean(-1, True) + 1).rsqrt())),
        (X.bfloat16(),),
    ),
    "one dtype for all of them": (
        "fold-batch-norm",
        lambda: nn.Sequential(nn.Conv2d(6, 8, 3).bfloat16(), nn.BatchNorm2d(8)).eval(),
        lambda: nn.Sequential(nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8)).bfloat16().eval(),
        (IMAGE.bfloat16(),),
    ),
    "model.eval()": (
        "use-channels-last", lambda: nn.Sequential(CONVOLUTION, NORM).train(),
        lambda: nn.Sequential(CONVOLUTION, NORM).eval(), (IMAGE,),
    ),
    "a batch of one": (
        "use-channels-last", lambda: Method(lambda s, x: s.c(x), c=CONVOLUTION),
        lambda: Method(lambda s, x: s.c(x[None]), c=CONVOLUTION), (IMAGE[0],),
    ),
    "masked_fill with -inf": (
        "fuse-attention",
        lambda: attention(
            lambda s, seen: (s + torch.where(LOWER, 0, SMALLEST)).masked_fill(~seen, SMALLEST)
        ),
        lambda: attention(
            lambda s, seen: s.masked_fill(~LOWER, -torch.inf).masked_fill(~seen, -torch.inf)
        ),
        (Q, K, V, SEEN),
    ),
    "the scores alone, whose softmax is the same": (
        "fuse-attention", lambda: attention(lambda s, seen: s + 1.5), lambda: attention(lambda s, seen: s),
        (Q, K, V, SEEN),
    ),
    "a result in torch.float32": (
        "fuse-rope", lambda: rotated(lambda y: y), lambda: rotated(torch.Tensor.float), (Q, COS, SIN),
    ),
    "keys and values repeated before it": (
        "split-attention", lambda: repeated(1), lambda: repeated(2), (X,),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:pass")
@pytest.mark.parametrize("change", CHANGES)
def test_as_a_refusal_says_it_should_be_the_site_is_taken(change):
    name, refused, taken, args = CHANGES[change]
    one, grad = discover.parse(name), name in ("use-channels-last", "split-attention")
    record = tried(one, refused(), *args, grad=grad)
    assert change in {s.change for s in (*record.refused, *record.near_misses)}
    assert not record.applied
    assert tried(one, taken(), *args, grad=grad).applied


# -- passes with a plan ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:pass")
def test_reasons_that_a_plan_holds_as_one_keep_their_changes():
    model = Method(lambda s, x: s.q(x) * s.k(x) + s.q.weight.sum(), q=nn.Linear(8, 8), k=nn.Linear(8, 8))
    changes = {s.path: s.change for s in tried(discover.parse("merge-linears"), model, X).refused}
    assert changes == {"q": "a weight of its own; even_if_slower=true", "k": "even_if_slower=true"}


@pytest.mark.filterwarnings("ignore:pass")
def test_a_plan_names_no_change_where_one_of_its_reasons_has_none():
    model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)).train()
    (site,) = tried(discover.parse("use-channels-last"), model, X, grad=True).refused
    assert len(site.why.split("; ")) == 2
    assert site.change == ""
