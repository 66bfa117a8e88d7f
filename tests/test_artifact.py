"""Saved models: a fresh process repeats no pass; a damaged or hostile file is an error and runs nothing."""

import contextlib
import json
import os
import pickletools
import struct
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxaccel
from fxaccel import artifact
from fxaccel.artifact import _digest
from fxaccel.errors import ArtifactError, CaptureError

F = nn.functional


class Rich(nn.Module):
    """Tied weights, a buffer that is not saved by torch, constants, dropout, a nested result."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight
        self.norm, self.drop = nn.LayerNorm(8), nn.Dropout(0.25)
        self.frozen = nn.Linear(8, 8)
        self.frozen.requires_grad_(False)
        self.register_buffer("table", torch.arange(8.0), persistent=False)
        self.register_buffer("count", torch.zeros(()))
        self.constant = torch.full((8,), 0.5)

    def forward(self, ids, *, scale=1.0):
        self.count.add_(1)
        x = self.norm(self.embed(ids)) * self.table + self.constant
        x = self.drop(self.frozen(x)) * scale
        with torch.no_grad():
            stop = x.sum(-1)
        return {"logits": self.head(x), "parts": (stop, [None, ids.shape[1]]), "word": "text"}


@pytest.fixture(scope="module")
def captured():
    """The model, what it became after calls of four kinds, and their input."""
    torch.manual_seed(0)
    model = Rich().eval()
    fast = fxaccel.accelerate(model, measure=False)
    ids = torch.randint(0, 11, (2, 5))
    fast(ids)
    fast(ids, scale=2.0)
    with torch.no_grad():
        fast(ids)
    fast.train()
    fast(ids)
    return model, fast, ids


@pytest.fixture
def saved(captured, tmp_path):
    model, fast, ids = captured
    fast.eval().zero_grad()
    path = tmp_path / "model.fxa"
    fast.save(path)
    return model, fast, ids, path


def same(got, want):
    assert list(got) == list(want)
    torch.testing.assert_close(got["logits"], want["logits"])
    torch.testing.assert_close(got["parts"][0], want["parts"][0])
    assert got["parts"][1] == want["parts"][1]
    assert got["word"] == want["word"]


def test_a_loaded_model_is_the_saved_one(saved):
    _, fast, ids, path = saved
    again = fxaccel.load(path)
    for arguments in ((ids,), (torch.randint(0, 11, (4, 9)),)):
        same(again(*arguments), fast(*arguments))
        same(again(*arguments, scale=2.0), fast(*arguments, scale=2.0))
    with torch.no_grad():
        same(again(ids), fast(ids))
    again.train(), fast.train()
    for one in (again, fast):
        torch.manual_seed(3)
        one(ids)["logits"].sum().backward()
    torch.testing.assert_close(again.embed.weight.grad, fast.embed.weight.grad)


def test_state_ties_kinds_and_flags_are_kept(saved):
    _, fast, _, path = saved
    again = fxaccel.load(path)
    assert again.head.weight is again.embed.weight
    for names in ("named_parameters", "named_buffers"):
        want, got = dict(getattr(fast, names)()), dict(getattr(again, names)())
        assert list(got) == list(want)
        torch.testing.assert_close(got, want)
        assert [t.requires_grad for t in got.values()] == [t.requires_grad for t in want.values()]
    assert list(again.state_dict()) == list(fast.state_dict())
    assert "table" not in again.state_dict()
    other = Rich().eval()
    again.load_state_dict(other.state_dict())
    ids = torch.randint(0, 11, (2, 5))
    same(again(ids), other(ids))


def test_the_report_the_code_and_the_proofs_are_kept(saved):
    _, fast, _, path = saved
    again = fxaccel.load(path)
    assert again.report().to_json() == fast.report().to_json()
    assert len(again.report()["fuse-norm"].applied) == 4
    strip = lambda code: code.replace(" ", "")  # noqa: E731
    assert strip(again.code).count("fuse-norm") == strip(fast.code).count("fuse-norm") > 0
    proofs = fast.verify().proofs
    checked = again.verify()
    assert checked.ok
    assert [(p.key, p.ok) for p in checked.proofs] == [(p.key, p.ok) for p in proofs]


def test_a_call_that_was_not_captured_is_a_capture_error(saved):
    _, _, ids, path = saved
    again = fxaccel.load(path)
    with pytest.raises(CaptureError, match=r"make such a call before fast\.save"):
        again(ids, scale=3.0)
    with pytest.raises(CaptureError):
        again(ids.float())


def test_a_loaded_model_can_be_saved_and_moved(saved, tmp_path):
    _, fast, ids, path = saved
    again = fxaccel.load(path)
    again.save(tmp_path / "again.fxa")
    third = fxaccel.load(tmp_path / "again.fxa")
    same(third(ids), fast(ids))


def test_a_fresh_process_without_the_models_code_repeats_no_pass(saved, tmp_path):
    _, fast, ids, path = saved
    torch.save({"ids": ids, "want": fast(ids)}, tmp_path / "data.pt")
    script = """
        import sys, torch, fxaccel
        from fxaccel import manager, session
        def never(*args, **kwargs): raise AssertionError("a pass was run")
        manager.run = session.manager.run = session.capture = session.canonicalize = never
        fast, data = fxaccel.load(sys.argv[1]), torch.load(sys.argv[2])
        got, want = fast(data["ids"]), data["want"]
        torch.testing.assert_close(got["logits"], want["logits"], rtol=0, atol=0)
        torch.testing.assert_close(got["parts"][0], want["parts"][0], rtol=0, atol=0)
        assert got["parts"][1] == [None, 5] and got["word"] == "text"
        assert fast.verify().ok
        assert "test_artifact" not in sys.modules
        print("equal", len(fast.report().captures))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), path, tmp_path / "data.pt"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "equal 4", done.stderr


def test_an_opened_object_comes_back_as_its_class(tmp_path):
    class Box:
        pass

    class Boxes(nn.Module):
        def forward(self, x):
            box = Box()
            box.x, box.n = x * 2, 3
            return box

    fast = fxaccel.accelerate(Boxes(), example_inputs=(torch.ones(2),))
    fast.save(tmp_path / "m.fxa")
    got = fxaccel.load(tmp_path / "m.fxa")(torch.ones(2))
    assert torch.equal(got.x, torch.full((2,), 2.0))
    assert got.n == 3


def test_saving_nothing_is_an_error_and_a_failing_save_leaves_the_old_file(tmp_path, monkeypatch):
    fast = fxaccel.accelerate(nn.Linear(2, 2))
    with pytest.raises(ArtifactError, match="call the model once"):
        fast.save(tmp_path / "m.fxa")
    fast(torch.ones(3, 2))
    fast.save(tmp_path / "m.fxa")
    before = (tmp_path / "m.fxa").read_bytes()
    monkeypatch.setattr(artifact, "save_file", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        fast.save(tmp_path / "m.fxa")
    assert (tmp_path / "m.fxa").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m.fxa"]


def test_the_file_is_safetensors_and_no_pickle(saved):
    path = saved[3]
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert json.loads(header["__metadata__"]["fxaccel"])["format"] == artifact.FORMAT
    assert not zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match=r"opcode|pickle|exhausted|ran out|invalid literal"):
        list(pickletools.genops(data))


# -- damage (at every byte: test_malformed.py) -----------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The bytes of a small saved model, and a call of it."""
    fast = fxaccel.accelerate(
        nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3)), example_inputs=(torch.ones(2, 3),)
    )
    path = tmp_path_factory.mktemp("small") / "m.fxa"
    fast.save(path)
    return path.read_bytes()


def refused(tmp_path, data, words=""):
    path = tmp_path / "damaged.fxa"
    path.write_bytes(data)
    with pytest.raises(ArtifactError) as caught:
        fxaccel.load(path)
    assert words in str(caught.value)


def test_foreign_files_are_refused(tmp_path):
    refused(tmp_path, b"not a model at all", "is not a saved model, or is damaged")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    refused(
        tmp_path, (tmp_path / "other.safetensors").read_bytes(), "is a safetensors file of something else"
    )
    torch.save({"a": 1}, tmp_path / "pickle.pt")
    refused(tmp_path, (tmp_path / "pickle.pt").read_bytes())
    with pytest.raises(ArtifactError, match="there is no file"):
        fxaccel.load(tmp_path / "absent.fxa")
    with pytest.raises(ArtifactError):
        fxaccel.load(tmp_path)


# -- malice: files with a right checksum -----------------------------------------------------------


def forged(small, tmp_path, change):
    """The path of the file with its description changed and its checksum made right again."""
    path = tmp_path / "forged.fxa"
    path.write_bytes(small)
    content, tensors = artifact._read(path)
    content = change(content) or content
    text = json.dumps(content)
    save_file(tensors, path, {"fxaccel": text, "sha256": _digest(text, tensors)})
    return path


def call_node(content):
    return next(n for n in content["captures"][0]["graph"]["nodes"] if n["op"] == "call_function")


EVIL = "__import__('os').system('touch {}')"


def set_guard(text):
    return lambda c, evil: c["captures"][0].update(guards=[text or evil])


def set_target(text):
    return lambda c, evil: call_node(c).update(target=text or evil)


CHANGES = {
    "version": lambda c, e: c.update(format=999),
    "no version": lambda c, e: c.pop("format") and None,
    "guard calls": set_guard(None),
    "guard attribute": set_guard("().__class__.__bases__[0]"),
    "guard lambda": set_guard("(lambda: 1)()"),
    "guard name": set_guard("open"),
    "guard call of a name": set_guard("exit(1) == 1"),
    "guard string": set_guard("'a' == 'a'"),
    "guard walrus": set_guard("(s0 := 1)"),
    "guard newline": set_guard("1 == 1\n    import os"),
    "target python": set_target("builtins.eval"),
    "target os": set_target("posix.system"),
    "target dotted": set_target("aten::linear.__class__"),
    "target namespace": set_target("__class__::mro.default"),
    "target load library": set_target("load_library::x.y"),
    "target higher": set_target("higher_order::auto_functionalized"),
    "target text": set_target(None),
    "node kind": lambda c, e: call_node(c).update(op="call_module"),
    "node method": lambda c, e: call_node(c).update(op="call_method", target="backward"),
    "node name": lambda c, e: call_node(c).update(name=e),
    "attribute path": lambda c, e: call_node(c).update(op="get_attr", target="root.__class__"),
    "input name": lambda c, e: next(n for n in c["captures"][0]["graph"]["nodes"]).update(name=e, target=e),
    "size name": lambda c, e: c["captures"][0].update(sizes={e: [0, 0]}),
    "dtype": lambda c, e: call_node(c).update(kwargs={"x": {"dtype": "load"}}),
    "value kind": lambda c, e: call_node(c).update(args=[{"eval": e}]),
    "kept object": lambda c, e: c["captures"][0]["out_spec"].update(special=[[0, {"kept": {"eval": e}}]]),
    "size of an input": lambda c, e: next(
        n for n in c["captures"][0]["graph"]["nodes"] if n["name"] == c["captures"][0]["inputs"][0]
    )["val"].update(shape=[e, 3]),
    "missing node": lambda c, e: call_node(c).update(args={"tuple": [{"node": "nowhere"}]}),
    "missing tensor": lambda c, e: c["state"][0].update(name="nothing.weight", same_as="nothing.weight"),
    "state name": lambda c, e: c["captures"][0].update(state={"x": ["parameter", e]}),
    "no captures": lambda c, e: c.pop("captures") and None,
    "a list": lambda c, e: [1, 2],
    "a number": lambda c, e: 3,
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_forged_description_is_an_error_and_executes_nothing(small, tmp_path, name):
    trace = tmp_path / "executed"
    path = forged(small, tmp_path, lambda c: CHANGES[name](c, EVIL.format(trace)))
    with pytest.raises(ArtifactError):
        fxaccel.load(path)(torch.ones(2, 3))
    assert not trace.exists()


@pytest.mark.parametrize("field", ["path", "source", "by"])
@pytest.mark.parametrize(
    "text",
    [
        f"x{end}__import__('os').system('touch {{}}')"
        for end in ("\n", "\n    ", "\r    ", "\r\n    ", "\x0c\n    ")
    ],
)
def test_text_that_becomes_a_comment_cannot_leave_it(small, tmp_path, field, text):
    trace = tmp_path / "executed"
    path = forged(small, tmp_path, lambda c: call_node(c).update({field: text.format(trace)}))
    with contextlib.suppress(ArtifactError):
        fxaccel.load(path)(torch.ones(2, 3))
    assert not trace.exists()


@pytest.mark.parametrize("field", ["name", "class"])
def test_names_of_the_state_cannot_become_code(small, tmp_path, field):
    trace = tmp_path / "executed"
    evil = "'] or " + EVIL.format(trace) + " or ['"

    def change(content):
        entry = content["state"][0]
        old, entry["name"] = entry["name"], evil
        for one in content["captures"]:
            one["state"] = {k: [kind, evil if n == old else n] for k, (kind, n) in one["state"].items()}

    path = forged(small, tmp_path, change)
    with contextlib.suppress(ArtifactError, CaptureError):
        fxaccel.load(path)(torch.ones(2, 3))
    assert not trace.exists()


def test_regions_cannot_become_code(small, tmp_path):
    trace = tmp_path / "executed"
    evil = f"x\nimport os; os.system('touch {trace}')"
    for region in (
        ["grad", 0, [EVIL.format(trace)]],
        [evil, 0, []],
        [f"x\n        {EVIL.format(trace)}, ", 0, []],
        ["stage", evil, []],
        ["autocast", 0, [evil, None, True, True]],
    ):
        path = forged(small, tmp_path, lambda c, r=region: call_node(c).update(regions=[r]))
        with contextlib.suppress(ArtifactError, CaptureError):
            fxaccel.load(path)(torch.ones(2, 3))
        assert not trace.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda one, name: one.update(stages=staged("absent")),
        lambda one, name: one.update(stages=staged(name, name)),
        lambda one, name: one.update(stages=staged(*name)),
        lambda one, name: one.update(stages=staged([name])),
        lambda one, name: one.update(stages=staged(), grad=False),
        lambda one, name: one.update(stages=staged(), schedule={"dropped": [], "again": []}),
        lambda one, name: one.update(stages=staged(microbatches=0)),
        lambda one, name: one.update(stages=staged(in_flight=[1, 1])),
        lambda one, name: one.update(stages=staged(schedules=[None, None])),
        lambda one, name: one.update(stages=staged(schedules=[{"dropped": ["absent"], "again": []}])),
    ],
)
def test_stages_are_those_of_the_graph(small, tmp_path, change):
    def changed(content):
        change(content["captures"][0], call_node(content)["name"])

    with pytest.raises(ArtifactError):
        fxaccel.load(forged(small, tmp_path, changed))
    whole = forged(small, tmp_path, lambda c: c["captures"][0].update(stages=staged(), grad=True))
    assert "def stage_0(" in fxaccel.load(whole).code


def staged(*begins, microbatches=1, in_flight=(), schedules=()):
    """What a file says of stages."""
    return {
        "begins": list(begins), "microbatches": microbatches, "in_flight": list(in_flight),
        "schedules": list(schedules),
    }  # fmt: skip


def test_nothing_is_imported_for_a_file(small, tmp_path):
    (tmp_path / "evil_module_for_test.py").write_text("raise SystemExit('imported')")
    sys.path.insert(0, str(tmp_path))
    try:
        path = forged(
            small,
            tmp_path,
            lambda c: c["captures"][0]["out_spec"].update(
                special=[[0, {"class": "evil_module_for_test:Thing"}]]
            ),
        )
        with contextlib.suppress(ArtifactError):
            fxaccel.load(path)(torch.ones(2, 3))
        assert "evil_module_for_test" not in sys.modules
    finally:
        sys.path.remove(str(tmp_path))
    assert Path(tmp_path / "evil_module_for_test.py").exists()
