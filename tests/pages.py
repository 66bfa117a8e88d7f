"""Reports to make pages of: of small models, and of a graph of any size that no one has to capture."""

from dataclasses import replace

import torch
from torch import nn

import fxaccel
from fxaccel.ir import call
from fxaccel.report import CaptureReport, PassReport, Report, Site

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self, d=16):
        super().__init__()
        self.norm, self.mix, self.odd = nn.LayerNorm(d), nn.Linear(d, d), nn.LayerNorm([4, d])

    def forward(self, x, seen):
        a = (x @ x.transpose(-1, -2)).masked_fill(~seen, float("-inf")).softmax(-1) @ x
        return self.odd(x + self.mix(self.norm(a)).sin())


class Net(nn.Module):
    def __init__(self, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, x):
        i = torch.arange(x.shape[-2])
        seen = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 2)
        for layer in self.layers:
            x = layer(x, seen)
        return x


def fast(layers=4, passes=("fuse-norm",), **options):
    return fxaccel.accelerate(
        Net(layers), list(passes), example_inputs=(torch.randn(2, 4, 16),), measure=False, **options
    )


def large(nodes, path="layers"):
    """A report of a graph of so many more nodes, of which one in ten is rewritten: ten of them a layer.

    The first half of the layers are all different, those of the other half are equal.
    """
    made = fast(1, check=False).report()
    ((graphs,),) = made.about.graphs
    before = graphs.canonical.copy()
    output = before.graph.output_node()
    last, sites = output.args[0][0], []
    with before.graph.inserting_before(output):
        for i in range(nodes):
            args = (last, i) if i < nodes // 2 else (last, 1)
            target = aten.add.Tensor if i % 10 else aten.mul.Tensor
            last = call(before.graph, last, target, args, {}, by="", val=last.meta["val"])
            last.meta |= {"path": f"{path}.{100 + i // 10}", "source": f"big.py:{i % 10}"}
    output.args = ([last],)
    after = before.copy()
    for node in list(after.graph.nodes):
        if node.target is aten.mul.Tensor and node.meta["path"].startswith(f"{path}.1"):
            node.target, node.meta["by"] = aten.div.Tensor, "divide"
            sites.append(Site(node.meta["path"], node.meta["source"], "", "Divide", node.name))
    made.about = replace(made.about, graphs=[[replace(graphs, canonical=before, program=after)]])
    refused = [replace(s, why=f"it is odd {i}") for i, s in enumerate(sites[:40])]
    made.captures = [CaptureReport("eval", [PassReport("divide", sites, refused)])]
    return made


EVIL = '<script>hacked=1</script><img src=x onerror="hacked=1">&amp;\'"</div></details></script>'


def evil(graphs=False):
    """A report in which every text is an attack."""
    sites = [
        Site(EVIL, f"{EVIL}.py:3", f"{kind} {EVIL}", EVIL, EVIL) for kind in ("applied", "refused", "near")
    ]
    one = PassReport(EVIL, *([s] for s in sites), plan=EVIL, error=EVIL, change=0.1)
    report = Report([CaptureReport(EVIL, [one], [EVIL], EVIL)])
    if graphs:
        report.about = replace(
            large(30, EVIL.replace(".", "")).about, model=EVIL, modules=(("", EVIL), (EVIL, EVIL))
        )
    return report
