"""The report: a table for people, JSON for programs, and every reason with the user's line."""

import json

import pytest
import torch
from torch import nn

import fxaccel
from fxaccel.report import CaptureReport, PassReport, Report, Site


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(3))
        self.odd = nn.LayerNorm([3, 8])

    def forward(self, x):
        for norm in self.norms:
            x = norm(x)
        return self.odd(x)


@pytest.fixture
def report():
    fast = fxaccel.accelerate(Net(), passes=["fuse-norm"])
    fast(torch.randn(4, 3, 8))
    with torch.no_grad():
        fast(torch.randn(4, 3, 8))
    return fast.report()


def test_sites_have_path_source_and_reason(report):
    merged = report["fuse-norm"]
    assert {s.path for s in merged.applied} == {"norms.0", "norms.1", "norms.2"}
    assert len(merged.applied) == 6  # in both captures
    assert all(s.source.startswith("test_report.py:") for s in merged.applied)
    assert {s.path for s in merged.refused} == {"odd"}
    assert all("it normalises over [3, 8]" in s.why for s in merged.refused)
    assert all(s.proof for s in merged.applied)


def test_the_table_counts_and_groups_equal_reasons(report):
    text = str(report)
    assert text.count("captured for training") == 2
    assert "captured for training, no gradients" in text
    row = next(line for line in text.splitlines() if line.startswith("fuse-norm  "))
    assert row.split()[:4] == ["fuse-norm", "3", "1", "0"]
    assert "fuse-norm refused  odd  test_report.py:" in text
    assert "checked against the model" in text


def test_json_goes_out_and_comes_back(report):
    again = Report.from_json(report.to_json())
    assert again == report
    data = json.loads(report.to_json())
    assert set(data) == {"captures"}
    assert set(data["captures"][0]) == {"mode", "passes", "notes", "check"}
    assert set(data["captures"][0]["passes"][0]["applied"][0]) == {
        "path",
        "source",
        "why",
        "rule",
        "node",
        "proof",
        "change",
    }


def test_passes_are_found_by_name(report):
    assert list(report) == ["fuse-norm"]
    assert "fuse-norm" in report
    assert "fuse-attention" not in report
    with pytest.raises(KeyError, match="'fuse-attention' ran in no capture; there were"):
        _ = report["fuse-attention"]


def test_equal_reasons_at_one_line_are_shown_once():
    sites = [Site(f"layers.{i}", "model.py:3", "too wide", "R", "n") for i in range(4)]
    text = str(Report([CaptureReport("eval", [PassReport("p", refused=sites)], ["remark"], "checked")]))
    assert text.count("too wide") == 1
    assert "layers.0  model.py:3: too wide  (and 3 like it)" in text
    assert "note: remark" in text


def test_an_empty_report_says_what_to_do():
    assert str(Report()) == "nothing captured yet: the model is captured at its first call"


def test_an_error_shows_why_a_pass_was_rolled_back():
    text = str(Report([CaptureReport("eval", [PassReport("p", error="it broke")])]))
    assert "p changed nothing: it broke" in text
