"""The page of a report: what is in it, that it is sound HTML, and that nothing in it comes from elsewhere."""

import gc
import pickle
import re
import weakref
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import fxaccel
from fxaccel.diff import Diff
from fxaccel.listing import lines
from fxaccel.page import NO_GRAPHS
from fxaccel.page.blocks import block_of, found_sites, rows
from fxaccel.page.figures import counted, sized
from fxaccel.page.markup import Markup, joined, tag
from fxaccel.passes._attention_pictures import cells
from fxaccel.passes.checkpoint import Checkpoint
from fxaccel.passes.partition import Partition
from fxaccel.report import CaptureReport, PassReport, Report, Site
from fxaccel.stopwatch import Times
from tests import pages
from tests.browser import MISSING, Browser

VOID = {"meta", "input"}


class Parsed(HTMLParser):
    """Elements with their attributes, and the text; a tag that is not closed in order is an error."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    def words(self):
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def fast():
    torch.manual_seed(0)
    return pages.fast()


@pytest.fixture(scope="module")
def report(fast):
    return fast.report()


@pytest.fixture(scope="module")
def parsed(report):
    return Parsed(report.html())


def test_it_names_model_mode_versions_sizes_and_passes(parsed):
    text = parsed.words()
    for word in ("fxaccel: Net", "captured for training", f"torch {torch.__version__}", "operator calls",
                 "bytes of parameters", "fuse-norm", "checked against the model"):  # fmt: skip
        assert word in text
    assert re.search(r"FLOPs of one forward run [\d.]+ k at s0 = 2: \d+\*s0", text)


def test_every_site_is_there_with_line_reason_and_proof(report, parsed):
    text, one = parsed.words(), report["fuse-norm"]
    assert (len(one.applied), len(one.refused)) == (4, 8)  # two rules refuse each of the odd norms
    for site in (*one.applied, *one.refused, *one.near_misses):
        for word in (site.path, site.source, site.why):
            assert " ".join(word.split()) in text
    assert "it normalises over [4, 16]" in text
    assert "return self.odd(x + self.mix(self.norm(a)).sin())" in text  # the user's own line
    ((graphs,),) = report.about.graphs
    (key,) = {s.proof for s in one.applied}
    proof = graphs.manifest.proofs[key]
    assert f"proof {key}, on which 4 sites rest" in text
    assert f"outputs {proof.error:.3g} gradients {proof.grad_error:.3g}" in text
    nbytes = 2 * 4 * 16 * 4
    assert f"bytes of results, computed {nbytes} B {nbytes} B" in text
    assert f"bytes read and written, computed {sized(2 * nbytes + 128)}" in text


def test_a_site_proved_at_a_smaller_size_costs_what_it_does_at_its_own(tmp_path):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(8, 1024, bias=False)

        def forward(self, x, labels):
            return torch.nn.functional.cross_entropy(self.head(x), labels)

    given = torch.randn(6, 8), torch.randint(1024, (6,))
    fast = fxaccel.accelerate(Head(), ["fuse-linear-loss{least=1KiB}"], example_inputs=given, check=False)
    text = Parsed(fast.report().html()).words()
    assert "509 for 1024" in text
    assert f"FLOPs, computed {counted(2 * 6 * 8 * 1024)} " in text
    fast.save(tmp_path / "head.fxa")
    text = Parsed(fxaccel.load(tmp_path / "head.fxa").report().html()).words()
    assert "509 for 1024" in text  # of the site's own size a file says nothing
    assert "FLOPs, computed" not in text


def test_gradients_are_shown_where_they_flow_alone():
    with torch.no_grad():
        text = Parsed(pages.fast(1, check=False).report().html()).words()
    assert "captured for training, no gradients" in text
    assert "outputs 0" in text
    assert "gradients 0" not in text


def test_measured_times_are_those_of_the_sentence():
    times = Times(3.25, 1.5)
    assert Times.told(f"causal; {times}") == times
    assert Times.told("takes its time") is None
    site = Site("a", "a.py:1", f"it {Times(1.0, 2.0)}", "Rule", "n")
    text = Parsed(Report([CaptureReport("eval", [PassReport("p", refused=[site])])]).html()).words()
    assert "time, measured on this machine 1 ms 2 ms" in text


def test_what_would_be_taken_stands_below_the_reason():
    site = Site("a", "a.py:1", "the softmax is over the queries", "Rule", "n", change="softmax(scores, -1)")
    text = Parsed(Report([CaptureReport("eval", [PassReport("p", near_misses=[site])])]).html()).words()
    assert "the softmax is over the queries it would be taken with: softmax(scores, -1)" in text


def test_equal_blocks_are_shown_once_with_their_paths(fast, parsed):
    layers = layers_of(fast.diff(), fast.report())
    assert [b.alike for b in layers.parts] == [["layers.0", "layers.1", "layers.2", "layers.3"]]
    assert sum(f.kind == "applied" for f in layers.every_site()) == 4
    assert "The same in layers.0, layers.1, layers.2, layers.3." in parsed.words()
    paths = [e[1]["data-paths"] for e in parsed.elements if "data-paths" in e[1]]
    assert [p for p in paths if "layers.2" in p] == ["layers.0 layers.1 layers.2 layers.3"]


def layers_of(diff, report):
    root = block_of(diff, found_sites(report.captures[0]))
    return next(p for p in root.parts if getattr(p, "path", "") == "layers")


@pytest.mark.parametrize("change", ["line", "literal", "site"])
def test_a_block_that_differs_is_shown_by_itself(fast, change):
    diff, report = fast.diff(), pickle.loads(pickle.dumps(fast.report()))
    diff = Diff(diff.before.copy(), diff.after.copy())
    mixes = [n for n in diff.after.graph.nodes if n.meta.get("path") == "layers.3"]
    if change == "line":
        mixes[0].meta["source"] = "elsewhere.py:1"
    if change == "literal":
        mixes[0].args = (mixes[0].args[0], [0, 1, 2])
    if change == "site":
        refused = report.captures[0].passes[0].refused
        refused[-1] = replace(refused[-1], why="of another reason")
    layers = layers_of(diff, report)
    assert [b.alike for b in layers.parts] == [["layers.0", "layers.1", "layers.2"], ["layers.3"]]


def test_both_sides_have_every_line_in_order(fast):
    diff = fast.diff()
    made = list(rows(diff))
    assert [r.old for r in made if r.old] == [line for _, line in lines(diff.before)]
    assert [r.new for r in made if r.new] == [line for _, line in lines(diff.after)]
    changed = [r.old.results[0] for r in made if r.changed and r.old and r.new]
    assert changed == ["layer_norm", "layer_norm_2", "layer_norm_4", "layer_norm_6"]
    assert len(list(block_of(diff, []).rows)) < len(made)


def test_the_page_is_equal_for_equal_models():
    made = []
    for _ in range(2):
        report = pages.fast(1, check=False).report()
        for one in report.captures[0].passes:
            one.seconds = 0.0
        made.append(report.html())
    assert made[0] == made[1]


def test_nothing_comes_from_elsewhere(report, parsed):
    assert not [e for e in parsed.elements if {"src", "srcset", "data", "action"} & set(e[1])]
    links = [e[1]["href"] for e in parsed.elements if "href" in e[1]]
    names = {e[1]["id"] for e in parsed.elements if "id" in e[1]}
    assert links
    assert all(link[0] == "#" and link[1:] in names for link in links)
    page = report.html()
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp", page)


@pytest.mark.parametrize("graphs", [False, True], ids=["report", "graphs"])
def test_what_comes_from_a_model_is_text(graphs, parsed):
    report = pages.evil(graphs)
    plain, found = parsed, Parsed(report.html())
    assert [e for e in found.elements if e[0] == "script"] == [e for e in plain.elements if e[0] == "script"]
    assert not [e for e in found.elements if e[0] == "img" or any(k.startswith("on") for k in e[1])]
    assert " ".join(pages.EVIL.split()) in found.words()


def test_markup_escapes_all_but_markup():
    assert tag("b", "<", title='"<') == '<b title="&quot;&lt;">&lt;</b>'
    assert joined(["&", Markup("<i></i>")]) == "&amp;<i></i>"
    assert tag("details", "", open=True, cls="") == "<details open></details>"


def test_a_report_without_graphs_is_a_page_that_says_so(report):
    text = Parsed(Report.from_json(report.to_json()).html()).words()
    assert NO_GRAPHS in text
    assert "Before and after" not in text
    assert "it normalises over [4, 16]" in text
    assert "which is not in this page" in text
    assert "nothing captured yet" in Parsed(Report().html()).words()
    assert NO_GRAPHS in report.within("fuse-norm", "layers.0").html()


def test_a_report_keeps_no_weights_alive_and_can_be_pickled(report):
    fast = pages.fast(1, check=False)
    kept, weight = fast.report(), weakref.ref(fast.layers[0].mix.weight)
    del fast
    gc.collect()
    assert weight() is None
    assert pickle.loads(pickle.dumps(kept)) == kept
    assert kept.html()


def test_a_loaded_model_has_its_graphs(tmp_path):
    pages.fast(1, check=False).save(tmp_path / "net.fxa")
    text = Parsed(fxaccel.load(tmp_path / "net.fxa").report().html()).words()
    assert "Before and after" in text
    assert "fxaccel.layer_norm" in text


def test_a_model_in_pieces_has_a_graph_for_each():
    class Breaks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = torch.nn.LayerNorm(8)

        def forward(self, x):
            x = self.norm(x)
            return x + 1 if x.sum().item() > 0 else self.norm(x.sin())

    fast = fxaccel.accelerate(Breaks(), ["fuse-norm"], example_inputs=(torch.randn(4, 8),), measure=False)
    fast(torch.randn(4, 8))
    text = Parsed(fast.report().html()).words()
    assert "Before and after, piece 1 of " in text
    assert "fxaccel.layer_norm" in text


def test_raw_compares_with_the_graph_as_captured():
    report = pages.fast(1, check=False).report()
    canonical, raw = Parsed(report.html()).words(), Parsed(report.html(raw=True)).words()
    assert "in the canonical form" in canonical
    assert "before the canonical form" in raw
    assert "transpose" in raw
    assert "aten.transpose" not in canonical


def test_figures_are_read_at_a_glance():
    assert [counted(x) for x in (0, 999, 1000, 2.5e9)] == ["0", "999", "1 k", "2.5 G"]
    assert [sized(x) for x in (0, 1023, 1024, 3 * 2**30)] == ["0 B", "1023 B", "1 KiB", "3 GiB"]


# -- pictures --------------------------------------------------------------------------------------


def test_a_mask_is_drawn_as_it_is():
    q, k = range(4), range(4)
    assert cells("(k <= q) & (k > q - 2)", 4, 4, q, k) == ["#...", "##..", ".##.", "..##"]
    assert cells("(k <= q) & t0[b, k]", 4, 4, q, k) == ["?...", "??..", "???.", "????"]
    assert cells("(k <= q) | t0[b, k]", 4, 4, q, k) == ["#???", "##??", "###?", "####"]
    assert cells("~((k > q) | t0[b, k])", 4, 4, q, k) == ["?...", "??..", "???.", "????"]
    assert cells("k < 2", 6, 6, range(0, 6, 3), range(0, 6, 2)) == ["#..", "#.."]


def test_each_kind_of_mask_is_in_the_page_once():
    text = Parsed(pages.fast(2, ["fuse-attention"], check=False).report().html())
    assert text.words().count("A row for each of 4 queries, a column for each of 4 keys") == 1
    assert "In layers.0, layers.1." in text.words()
    (drawn,) = [e[1]["d"] for e in text.elements if e[1].get("class") == "seen"]
    assert drawn == "M0 0h1v1h-1zM0 1h2v1h-2zM1 2h2v1h-2zM2 3h2v1h-2z"


def trained(*passes):
    fast = pages.fast(2, passes, check=False)
    return Parsed(fast.report().html())


def test_a_plan_for_memory_shows_its_curve():
    found = trained(Checkpoint(budget=0.7))
    text = found.words()
    assert "Memory of a training step" in text
    assert "What other budgets cost" in text
    assert {"was", "is", "mark"} <= {e[1].get("class") for e in found.elements}
    assert "not what is planned here now" not in text


def test_a_pipeline_shows_its_timeline():
    found = trained(Partition(stages=2, microbatches=2))
    assert "Timeline of the pipeline" in found.words()
    assert "Memory of the ranks" in found.words()
    blocks = [e for e in found.elements if e[0] == "rect" and "fill-opacity" in e[1]]
    assert len(blocks) == 2 * 2 * 2  # forward and backward of two microbatches on two ranks
    found = trained(Partition(stages=2, microbatches=2), Checkpoint(budget=0.95))
    assert "What is computed again in backward is not in it." in found.words()
    assert "one microbatch" in found.words()


# -- in a browser ----------------------------------------------------------------------------------

OPEN = "return [...document.querySelectorAll('main details')].filter(d => d.open).length"
SEEN = """return [...document.querySelectorAll('.graph .l')].filter(l => l.checkVisibility(
    {contentVisibilityAuto: false})).length"""


@pytest.fixture(scope="module")
def browser():
    with Browser() as made:
        yield made


def shown(browser, report, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(report.html(), encoding="utf-8")
    browser.open(file)
    return file


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
@pytest.mark.parametrize("nodes", [600, pytest.param(5000, marks=pytest.mark.slow)])
def test_it_folds_and_searches(browser, tmp_path, nodes):
    shown(browser, pages.large(nodes), tmp_path)
    assert browser.run("return document.querySelectorAll('.graph .l').length") > nodes / 2
    assert browser.run("return performance.getEntriesByType('resource').length") == 0
    at_first = browser.run(OPEN)
    assert browser.run(SEEN) < 100  # folded
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")

    browser.run("document.getElementById('open').click()")
    total = browser.run("return document.querySelectorAll('main details').length")
    assert browser.run(OPEN) == total > at_first
    left, right, above = browser.run("""
        const sides = [...document.querySelector('.graph .both').children];
        const [a, b] = sides.map(p => p.getBoundingClientRect());
        return [a.right <= b.left, a.left < b.left, a.top === b.top]""")
    assert (left, right, above) == (True, True, True)  # before and after lie beside each other
    assert browser.run("return document.documentElement.scrollWidth <= innerWidth")
    browser.run("document.getElementById('fold').click()")
    assert browser.run(OPEN) == 0

    found = search(browser, "layers.120 aten.mul")
    assert found == (1, "1 found")
    found = search(browser, "nowhere to be found")
    assert found == (0, "0 found")
    assert search(browser, "")[1] == ""
    assert browser.run(OPEN) == 0  # as it was before the search
    assert browser.console() == []


def search(browser, text):
    browser.run(f"""const s = document.getElementById('search'); s.value = {text!r};
        s.dispatchEvent(new Event('input'))""")
    browser.ask("POST", "/timeouts", {"script": 5000})
    browser.ask("POST", "/execute/async", {"script": "setTimeout(arguments[0], 600)", "args": []})
    return browser.run(SEEN), browser.run("return document.getElementById('hits').textContent")


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_an_attack_is_shown_and_not_run(browser, tmp_path):
    shown(browser, pages.evil(graphs=True), tmp_path)
    browser.run("document.getElementById('open').click()")
    assert browser.run("return typeof hacked") == "undefined"
    assert browser.run("return document.querySelectorAll('main script, img').length") == 0
    assert browser.console() == []


@pytest.mark.skipif(bool(MISSING), reason=MISSING)
def test_a_link_opens_what_it_points_to_and_unchanged_lines_can_be_hidden(browser, tmp_path):
    shown(browser, pages.large(400), tmp_path)
    browser.run("document.getElementById('open').click()")
    everything = browser.run(SEEN)
    browser.run("document.getElementById('changes').click()")
    changed = "document.querySelectorAll('.graph .both, .graph .new, .graph .old').length"
    assert everything > browser.run(SEEN) >= browser.run(f"return {changed}") > 0
    browser.run("document.getElementById('fold').click()")
    browser.run("document.querySelector('.graph a').click()")
    browser.ask("POST", "/execute/async", {"script": "setTimeout(arguments[0], 300)", "args": []})
    place = browser.run("""const r = document.querySelector(location.hash).getBoundingClientRect();
        return [r.height > 0, r.top >= 0, r.top < innerHeight]""")
    assert place == [True, True, True]
    assert browser.console() == []
