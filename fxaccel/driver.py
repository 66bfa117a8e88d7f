"""What a pass edits a program with: records of every site, proofs, and local rules run to their end."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from fxaccel.canonical.values import same_strides
from fxaccel.effects import UNWRITTEN, has_effect, is_random, written
from fxaccel.errors import RuleError
from fxaccel.ir import Program, call, expr, path, source, target_name, tensors, without_defaults
from fxaccel.pattern import Match, Miss, Ops
from fxaccel.proof import Claim, Manifest, Proof, composed, describe, fragment, prove
from fxaccel.report import PassReport, Site
from fxaccel.rule import Pass, Refusal, Rule, Search, joined
from fxaccel.stopwatch import Stopwatch, Times

ROUNDS_PER_NODE = 10  # rewrites a node of the graph, above which a rule feeds on its own output
SENTENCES = 1000  # that a rule has against one site, at most


def site_key(name: str, site: Site) -> str:
    """What names a site of a pass in every run over one graph."""
    return f"{name} {site.rule} {site.node}"


def same_type(old: Any, new: Any, what: str, name: str) -> None:
    """Raise RuleError where a value and what takes its place differ in kind, dtype, device or shape."""
    a = old.meta["val"] if isinstance(old, fx.Node) else old
    b = new.meta["val"] if isinstance(new, fx.Node) else new
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if (
            a.dtype == b.dtype
            and list(map(expr, a.shape)) == list(map(expr, b.shape))
            and a.device == b.device
        ):
            return
        raise RuleError(
            f"{name} changed the type of {what}: had {a.dtype}{list(a.shape)} on {a.device}, "
            f"replacement is {b.dtype}{list(b.shape)} on {b.device}"
        )
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
        raise RuleError(f"{name} changed {what} from {type(a).__name__} to {type(b).__name__}")


class Driver:
    """What a pass edits and records with: `applied`, `refused`, `call`, `prove` and `rewrite`."""

    def __init__(
        self, program: Program, one: Pass, record: PassReport, manifest: Manifest,
        stopwatch: Stopwatch | None = None, only: frozenset[str] | None = None,
    ) -> None:  # fmt: skip
        self.program, self.one, self.record, self.manifest = program, one, record, manifest
        self.stopwatch, self.only = stopwatch, only
        self.relaid: set[fx.Node] = set()  # nodes with other strides than what they took the place of

    def applied(self, node: fx.Node, why: str = "", rule: str = "", proof: str = "") -> None:
        """Record a rewritten site."""
        self.record.applied.append(self._site(node, why, rule, proof))

    def refused(self, node: fx.Node, why: str | Sequence[str], rule: str = "") -> None:
        """Record a site that is left alone, with the sentences that say why.

        What would have to change for it is told where each of them knows.
        """
        why = why if isinstance(why, str) else joined(why)
        self.record.refused.append(self._site(node, why, rule))

    def _site(self, node: fx.Node, why: str, rule: str, proof: str = "") -> Site:
        change = why.change if isinstance(why, Refusal) else ""
        return Site(path(node), source(node), str(why), rule or self.one.name, node.name, proof, change)

    def slower(self, before: Program) -> bool:
        """Whether the graph takes too long with all sites of a pass that is timed `together`.

        They are then on record as refused.
        """
        if self.stopwatch is None or not self.one.together or not self.record.applied:
            return False
        times = self.stopwatch.whole(before, self.program, self.one.at_most)
        if times is None or not times.slower(self.one.at_most):
            return False
        sites = self.record.applied
        many = f" with all {len(sites)}" if len(sites) > 1 else ""
        why = _slower(self.one, f"the graph {times}{many}")
        self.record.refused += [replace(s, why=str(why), change=why.change, proof="") for s in sites]
        self.record.applied = []
        return True

    def call(self, like: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call at the graph's insertion point with the provenance of `like`."""
        return call(self.program.graph, like, target, args, kwargs, by=self.one.name)

    def prove(
        self, rule: str, nodes: Iterable[fx.Node], new: Iterable[fx.Node],
        outputs: Sequence[fx.Node], replaced: Sequence[fx.Node], any_size: int | None = None,
    ) -> Proof:  # fmt: skip
        """Compare existing `nodes` with the `new` ones that are to take their place.

        any_size   a fixed size that could as well be another
        """
        claim = self.claim(rule, nodes, new, outputs, replaced).smaller(any_size)
        return prove(self.program, claim, self.manifest)

    def claim(
        self, rule: str, nodes: Iterable[fx.Node], new: Iterable[fx.Node],
        outputs: Sequence[fx.Node], replaced: Sequence[fx.Node],
    ) -> Claim:  # fmt: skip
        """That existing `nodes` compute what the `new` ones do that are to take their place."""
        old, made = sorted(nodes), list(new)  # in the graph's order: the key and the seed depend on it
        reads = dict.fromkeys(a for n in [*old, *made] for a in n.all_input_nodes)
        inputs = [n for n in reads if n not in old and n not in made]
        before = fragment(self.program, old, inputs, outputs)
        after = fragment(self.program, made, inputs, replaced)
        return Claim(rule, before, after, self.one.numerics)

    def lemma(
        self, rule: str, like: fx.Node, inputs: Sequence[fx.Node],
        before: Callable[[Ops, Any], fx.Node], after: Callable[[Ops, Any], fx.Node],
    ) -> Proof:  # fmt: skip
        """Compare what two functions of (op, of) write out, where `of(x)` stands for the nodes in x.

        A pass that rewrites at many places that depend on each other proves each step by itself: what is
        shown for any `inputs` holds for those of the graph. It is exact, whatever the pass is.
        """
        old, new = (composed(self.program, like, inputs, build) for build in (before, after))
        return prove(self.program, Claim(rule, old, new, "reassociated"), self.manifest)

    def ops(self, like: fx.Node) -> Ops:
        """Writes calls at the graph's insertion point with the provenance of `like`."""
        return Ops(lambda target, args, kwargs: self.call(like, target, *args, **kwargs))

    def exchange(self, old: fx.Node, new: fx.Node) -> None:
        """Let all readers of `old` read `new`, under the old name, and erase `old` if it may go."""
        old.replace_all_uses_with(new, propagate_meta=False)
        pairs = zip(tensors(old.meta["val"]), tensors(new.meta["val"]), strict=True)
        if not all(same_strides(a, b) for a, b in pairs):
            self.relaid.add(new)
        if not has_effect(old):
            self.program.graph.erase_node(old)
            new.name = old.name

    # -- local rules ------------------------------------------------------------------------------

    def rewrite(self, rules: Sequence[Rule]) -> None:
        """Apply local rules wherever they match, until none fires."""
        position = {n.name: i for i, n in enumerate(self.program.graph.nodes)}
        local = _Local(self, rules)
        while local.sweep():
            pass
        for sites in (self.record.applied, self.record.refused, self.record.near_misses):
            sites.sort(key=lambda s: position.get(s.node, len(position)))


def _slower(one: Pass, why: str) -> Refusal:
    return Refusal(why, f"name {one.name} among `passes` to have it all the same")


class _Local:
    """One run of local rules over a graph."""

    def __init__(self, driver: Driver, rules: Sequence[Rule]) -> None:
        self.driver, self.program = driver, driver.program
        self.searches = [(rule, rule.traced()) for rule in rules]
        self.writers = self.program.facts(written)
        self.seen: set[tuple[str, fx.Node]] = set()  # sites whose refusal or miss is on record
        self.given_up: set[tuple[str, fx.Node]] = set()  # sites that take longer than before
        self.results: dict[Any, Any] = {}  # fake values of calls: equal sites share them
        self.budget = ROUNDS_PER_NODE * len(self.program.graph.nodes) + ROUNDS_PER_NODE

    def sweep(self) -> bool:
        """Visit every node, the last first so that the largest match wins; whether anything changed."""
        before = self.budget
        for node in reversed(list(self.program.graph.nodes)):
            self.visit(node)
        return self.budget != before

    def visit(self, node: fx.Node) -> None:
        """Rewrite at `node`, then at the nodes that came of it."""
        queue = [node]
        while queue:
            root = queue.pop(0)
            if root._erased or root.op != "call_function" or not self.driver.one.covers(root):
                continue
            for rule, search in self.searches:
                made = self.attempt(rule, search, root) if root.target in search.targets else []
                if made:
                    queue += made
                    self.spend(rule)
                    break

    def spend(self, rule: Rule) -> None:
        self.budget -= 1
        if self.budget < 0:
            raise RuleError(f"{type(rule).__name__} feeds on its own output and comes to no end")

    def attempt(self, rule: Rule, search: Search, root: fx.Node) -> list[fx.Node]:
        """Rewrite one site if it matches and nothing speaks against it; returns the new nodes."""
        name = type(rule).__name__
        if (name, root) in self.given_up:
            return []
        found = search.find(self.program, root)
        if isinstance(found, Miss):
            if found.depth > 1 and (name, root) not in self.seen:
                self.seen.add((name, root))
                why = Refusal(found.why, found.change) if found.change else found.why
                self.driver.record.near_misses.append(self.driver._site(root, why, name))
            return []
        said = [*_sentences(rule, found), *self.obstacles(rule, found), *self.left_out(name, root)]
        if said:
            if (name, root) not in self.seen:
                self.seen.add((name, root))
                self.driver.refused(root, said, name)
            return []
        return self.replace(rule, found)

    def left_out(self, name: str, root: fx.Node) -> Iterable[str]:
        """Whether the run is to leave this site as it is."""
        only, site = self.driver.only, self.driver._site(root, "", name)
        if only is not None and site_key(self.driver.one.name, site) not in only:
            yield "it is left out"

    def obstacles(self, rule: Rule, m: Match) -> Iterable[str]:
        """What no rule may do: lose a value that is read, reorder writes, mix regions."""
        for node in m.nodes - set(m.outputs):
            reader = next((u for u in node.users if u not in m.nodes), None)
            if reader is not None:
                by = "the output" if reader.op == "output" else target_name(reader.target)
                at = f" at {source(reader)}" if source(reader) else ""
                name = target_name(node.target)
                yield Refusal(
                    f"the intermediate {name} is also read by {by}{at}",
                    "return no such value" if reader.op == "output" else f"compute {name} for {by} once more",
                )
        if len({n.meta.get("regions", ()) for n in m.nodes}) > 1:
            yield Refusal(
                "the site lies partly inside a no_grad, autocast or checkpoint region",
                "begin the region before the site, or after it",
            )
        inside = m.nodes | m.also
        for node in inside | _reads(m):
            writer = self.writers.get(node)
            if writer is not None and not all(writer < n for n in inside & {node, *node.users}):
                name = target_name(writer.target)
                yield Refusal(
                    f"%{node.name} is written in place by {name} at {source(writer)}",
                    UNWRITTEN,
                )
        yield from _effects(rule, m)
        if any(not read < _point(m) for read in _reads(m)):
            yield "a value of the site is read before all of its inputs are there"

    def replace(self, rule: Rule, m: Match) -> list[fx.Node]:
        graph, name, made = self.program.graph, type(rule).__name__, list[fx.Node]()

        def make(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            args = without_defaults(target, args)
            given = fx.map_arg((args, kwargs), lambda n: describe(n.meta["val"]))
            like = (target, str(given), m.root.meta.get("regions", ()))
            known = self.results.get(like)
            node = call(graph, m.root, target, args, kwargs, by=self.driver.one.name, val=known)
            made.append(node)
            val = self.results[like] = node.meta["val"]
            if not isinstance(val, (tuple, list)):
                return node
            by = self.driver.one.name
            parts = [
                call(graph, m.root, operator.getitem, (node, i), by=by, val=v) for i, v in enumerate(val)
            ]
            made.extend(parts)
            return tuple(parts)

        with graph.inserting_before(_point(m)):
            returned = rule.rewrite(Ops(make), m)
        outputs = returned if isinstance(returned, tuple) else (returned,)
        if len(outputs) != len(m.outputs) or not all(isinstance(o, fx.Node) for o in outputs):
            raise RuleError(f"{name}.rewrite returned {len(outputs)} values, its pattern {len(m.outputs)}")
        for old, new in zip(m.outputs, outputs, strict=True):
            same_type(old, new, f"%{old.name}", name)
        claim = self.driver.claim(name, m.nodes | m.also, made, m.outputs, outputs)
        times = self.times(rule, m, made, outputs, claim)
        if times is not None and times.slower(rule.at_most):
            self.give_up(rule, m.root, made, str(times))
            return []
        proof = prove(self.program, claim.smaller(rule.any_size(m)), self.driver.manifest)
        said = [w for w in (rule.remark(m), times and str(times)) if w]
        self.driver.applied(m.root, "; ".join(said), name, proof.key)
        self.program.redrawn |= rule.numerics != "bitwise" and any(map(is_random, m.nodes))
        self.swap(m, outputs, made)
        return [n for n in made if not n._erased]

    def times(
        self, rule: Rule, m: Match, made: list[fx.Node], outputs: Sequence[fx.Node], claim: Claim
    ) -> Times | None:
        """What a site takes before and after; what others read too, a mask say, is there in both."""
        if self.driver.stopwatch is None or self.driver.one.together:
            return None
        own, common = set(m.nodes), _in_common(m, made)
        for node in sorted(m.also - common, reverse=True):
            if own.issuperset(node.users):
                own.add(node)
        beside = not own.issuperset(m.also)
        if beside:
            claim = self.driver.claim(claim.rule, own, made, m.outputs, outputs)
        in_common = beside or bool(common)
        return self.driver.stopwatch.times(self.program, claim, rule.at_most, in_common)

    def give_up(self, rule: Rule, root: fx.Node, made: list[fx.Node], why: str) -> None:
        """Leave a site as it is: take out what was made for it."""
        for node in reversed(made):
            self.program.graph.erase_node(node)
        self.given_up.add((type(rule).__name__, root))
        self.driver.refused(root, [_slower(self.driver.one, f"it {why}")], type(rule).__name__)

    def swap(self, m: Match, outputs: Sequence[fx.Node], made: list[fx.Node]) -> None:
        """Put the new values in the place of the old ones, under the old names."""
        graph = self.program.graph
        for old, new in zip(m.outputs, outputs, strict=True):
            old.replace_all_uses_with(new, propagate_meta=False)
            pairs = zip(tensors(old.meta["val"]), tensors(new.meta["val"]), strict=True)
            if not all(same_strides(a, b) for a, b in pairs):
                self.driver.relaid.add(new)
        for node in sorted(m.nodes, reverse=True):
            if not node.users:
                graph.erase_node(node)
        for node in reversed(made):
            if not node.users and not has_effect(node):
                graph.erase_node(node)
        for old, new in zip(m.outputs, outputs, strict=True):
            if new in made and old._erased:
                new.name = old.name
                new.meta.update(path=path(old), source=source(old))
        self.program.changed([n for n in made if not n._erased])


def _effects(rule: Rule, m: Match) -> Iterable[str]:
    """What the site does besides computing, and the rule may not take in."""
    for node in m.nodes | m.also:
        if is_random(node) and not (rule.redraws and node in m.nodes):
            yield f"{target_name(node.target)} draws random numbers"
        elif has_effect(node) and not is_random(node):
            yield f"{target_name(node.target)} has an effect besides its result"


def _reads(m: Match) -> set[fx.Node]:
    """Nodes outside of the match that it reads."""
    inside = m.nodes | m.also
    return {a for n in inside for a in n.all_input_nodes} - inside


def _in_common(m: Match, made: Iterable[fx.Node]) -> set[fx.Node]:
    """What the site reads that the same operator reads at another, a mask say, and what it makes of that."""
    inside = {*m.nodes, *m.also, *made}
    found = set[fx.Node]()
    for node in _reads(m):
        targets = {u.target for u in node.users if u in inside}
        if any(u.target in targets for u in node.users if u not in inside):
            found.add(node)
    for node in sorted(m.also):
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _point(m: Match) -> fx.Node:
    """The node before which the replacement goes: the first reader of any of its values, or the root."""
    readers = [u for o in m.outputs for u in o.users if u not in m.nodes]
    return min([m.root, *readers])


def _sentences(rule: Rule, m: Match) -> list[str]:
    sentences = list(itertools.islice(rule.refuse(m), SENTENCES + 1))
    if len(sentences) > SENTENCES:
        raise RuleError(f"{type(rule).__name__}.refuse comes to no end: {sentences[0]!r}")
    for sentence in sentences:
        if not isinstance(sentence, str):
            raise RuleError(f"{type(rule).__name__}.refuse must yield str, got {sentence!r}")
    return sentences
