"""Run the linears that read one value as one linear, their weights below each other.

    q = linear(x, Wq, bq)        W, b = cat([Wq, Wk, Wv]), cat([bq, bk, bv])
    k = linear(x, Wk, bk)    =>  q, k, v = linear(x, W, b).split([Nq, Nk, Nv], -1)
    v = linear(x, Wv, bv)

Fires on   linears of one input: queries, keys and values, also where fewer heads make keys and values
           narrower; gate and up; any number of them. Where some have a bias, the others add zeros.
Saves      on a GPU all launches but one, and reading x once for each; in training the sum of the gradients
           of x. The results are views of one tensor. In inference the weights are laid below each other
           once, which takes their memory twice; with fold=true they are one parameter, in training too.
Exact      each result is the same sum of products; the gradient of x is summed in another order.
Source     Shoeybi et al. 2019, "Megatron-LM", arXiv:1909.08053, whose attention has one such product.
"""

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxaccel.effects import UNWRITTEN, storage_owner, written
from fxaccel.ir import Program, Replacement, arguments, fake_mode, is_call, source, target_name
from fxaccel.passes._advice import EVEN_IF_SLOWER, OWN
from fxaccel.passes._linear_sites import parameter
from fxaccel.rule import Ops, Pass, Refusal, joined, register

aten = torch.ops.aten


@dataclass(frozen=True)
class Below:
    """Weights as one, below each other (beside, where linears read them transposed), and biases as one."""

    sizes: tuple[int, ...]
    dim: int
    biased: bool

    def __call__(self, *old: Tensor) -> tuple[Tensor, ...]:
        """The merged tensors of the original ones, weights first."""
        count = len(self.sizes)
        whole = (torch.cat(old[:count], self.dim),)
        return (*whole, torch.cat(old[count:])) if self.biased else whole

    def apart(self, *new: Tensor) -> tuple[Tensor, ...]:
        """The original tensors, views of the merged ones."""
        parts = new[0].split(self.sizes, self.dim)
        return (*parts, *new[1].split(self.sizes)) if self.biased else parts


@dataclass(frozen=True)
class Group:
    """Linears of x that become one, and the parameters that they read; None where one has no bias."""

    x: fx.Node
    linears: tuple[fx.Node, ...]
    weights: tuple[fx.Node, ...]
    biases: tuple[fx.Node | None, ...]
    flipped: bool

    @property
    def sizes(self) -> list[int]:
        """How many outputs each has."""
        return [int(w.meta["val"].shape[int(self.flipped)]) for w in self.weights]


@dataclass(frozen=True)
class Merges:
    """The linears to merge, and those that stay with the sentence that says why."""

    groups: tuple[Group, ...]
    refused: tuple[tuple[fx.Node, str], ...]

    def __str__(self) -> str:
        told = [" + ".join(map(str, g.sizes)) + f" outputs of %{g.x}" for g in self.groups]
        return "; ".join([*told, f"{len(self.refused)} linears stay"])


@register
class MergeLinears(Pass):
    """Linears that read one value become one linear.

    fold              put one parameter in the place of theirs, which takes no second memory and is the form
                      for training; the state_dict stays the original's, an optimizer is given the new ones
    even_if_slower    merge where it does not pay too: on the CPU; in training without `fold`
    """

    name = "merge-linears"
    step = "lower"  # what another pass holds in a form of its own is not merged

    fold: bool = False
    even_if_slower: bool = False

    # -- plan -------------------------------------------------------------------------------------

    def plan(self, program: Program) -> Merges:
        """Sort the linears of each value by what may be one."""
        readers = defaultdict[Any, list[fx.Node]](list)
        for node in program.graph.nodes:
            if is_call(node, aten.linear.default) and self.covers(node):
                readers[node.args[0]].append(node)
        groups, refused = list[Group](), list[tuple[fx.Node, str]]()
        for linears in readers.values():
            if len(linears) > 1:
                found, left = self.divided(program, linears)
                groups, refused = groups + found, refused + left
        return Merges(tuple(groups), tuple(refused))

    def divided(
        self, program: Program, linears: Sequence[fx.Node]
    ) -> tuple[list[Group], list[tuple[fx.Node, str]]]:
        """The groups among the linears of one value, and the others with the reason."""
        why = {n: joined(self.refuse(program, n)) for n in linears}
        refused = [(n, w) for n, w in why.items() if w]
        alike = defaultdict[Any, list[fx.Node]](list)
        for node in linears:
            if not why[node]:
                alike[tuple(self.kind(program, node).items())].append(node)
        groups = []
        for kind, nodes in alike.items():
            if len(nodes) > 1:
                weights = tuple(parameter(program, n.args[1])[0] for n in nodes)
                biases = tuple(arguments(n)["bias"] for n in nodes)
                flipped = dict(kind)["its weight is"] == TRANSPOSED
                groups.append(Group(nodes[0].args[0], tuple(nodes), weights, biases, flipped))
            else:
                refused.append((nodes[0], _alone(dict(kind), [dict(k) for k in alike if k != kind])))
        return groups, refused

    def refuse(self, program: Program, linear: fx.Node) -> Iterator[str]:
        """Why a linear is not merged with any."""
        weight, flipped = parameter(program, linear.args[1])
        if weight is None or weight.meta["val"].dim() != 2:
            yield Refusal(
                "its weight is not a matrix among the parameters of the model", "a matrix that is one of them"
            )
            return
        name, bias = program.state[weight.name].name, arguments(linear)["bias"]
        for names in program.ties:
            if name in names:
                yield Refusal(f"its weight is one tensor under the names {', '.join(names)}", OWN)
        uses = [u for p in weight.users if flipped for u in p.users] or list(weight.users)
        for user in {*weight.users, *uses} - {linear, linear.args[1]}:
            by = "the output" if user.op == "output" else f"{target_name(user.target)} at {source(user)}"
            yield Refusal(f"its weight is also read by {by}", OWN)
        if bias is not None and bias.name not in program.state:
            yield Refusal(f"its bias %{bias.name} is computed", "a parameter as its bias")
        writers = program.facts(written)
        for node in (*linear.all_input_nodes, linear):
            if node in writers:
                by = target_name(writers[node].target)
                yield Refusal(f"%{node.name} is written in place by {by}", UNWRITTEN)
        yield from self.slower(program, weight)

    def slower(self, program: Program, weight: fx.Node) -> Iterator[str]:
        """Where merging does not pay."""
        if self.even_if_slower:
            return
        if weight.meta["val"].device.type == "cpu":
            yield Refusal(
                "on the CPU one product takes as long as those that it is made of, and splitting it more",
                EVEN_IF_SLOWER,
            )
        if program.grad and not self.fold:
            yield Refusal(
                "where gradients flow, its weight would be laid below the others at each call", "fold=true"
            )

    def kind(self, program: Program, linear: fx.Node) -> dict[str, str]:
        """What linears that become one have in common, in the words of a refusal."""
        weight, flipped = parameter(program, linear.args[1])
        assert weight is not None, "it was refused"
        val, name = weight.meta["val"], program.state[weight.name].name
        regions = " ".join(f"{r}{r.args}" for r in linear.meta.get("regions", ()))
        trains = val.requires_grad and (program.grad or self.fold)
        known = next((r.new[0] for r in self.adopted(program) if name in r.old), "")
        return {
            "its weight is": TRANSPOSED if flipped else "read as it is",
            "its weight has dtype": str(val.dtype),
            "its weight in training is": "trained" if trains else "held fixed",
            "it lies in": regions or "no region",
            "an earlier capture has merged it into": known or "none",
        }

    def adopted(self, program: Program) -> list[Replacement]:
        """What earlier captures of the module have in place."""
        return [r for r in program.adopted if r.by == self.name]

    # -- apply ------------------------------------------------------------------------------------

    def apply(self, program: Program, plan: Merges, driver: Any) -> None:
        """Merge each group; then let it read one parameter where that is wanted, or is so already."""
        for linear, why in plan.refused:
            driver.refused(linear, why)
        adopted = self.adopted(program)
        taken = {name for one in adopted for name in one.old}
        merged = [(g, self.merge(program, g, driver)) for g in plan.groups]
        for group, tensors in merged if self.fold else ():
            one = self.replacement(program, group)
            if taken.isdisjoint(one.old):
                _replace(program, one, driver, tensors)
        for one in adopted:
            _replace(program, one, driver, [t for _, tensors in merged for t in tensors])

    def merge(self, program: Program, group: Group, driver: Any) -> list[fx.Node]:
        """One linear in the place of a group's; returns what is made of its parameters."""
        first, made = min(group.linears), list[fx.Node]()

        def make(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
            made.append(driver.call(first, target, *args, **kwargs))
            return made[-1]

        outputs = program.graph.output_node().all_input_nodes
        shown = {storage_owner(n) for n in outputs}
        with program.graph.inserting_before(first):
            op = Ops(make)
            parts, tensors = _merged(op, group)
            for i, linear in enumerate(group.linears):
                if linear in shown:  # alone: the others would live as long as it does
                    parts[i] = op.aten.clone.default(parts[i], memory_format=torch.contiguous_format)
        old = [*group.linears, *(n.args[1] for n in group.linears if group.flipped)]
        proof = driver.prove(type(self).__name__, old, made, group.linears, parts)
        told = f"one of {len(group.linears)}, of {' + '.join(map(str, group.sizes))} outputs"
        for linear, part in zip(group.linears, parts, strict=True):
            driver.applied(linear, told, proof=proof.key)
            driver.exchange(linear, part)
        return tensors

    def replacement(self, program: Program, group: Group) -> Replacement:
        """One parameter in the place of a group's weights, and one in that of biases that are alike."""
        weights, biases = list(group.weights), [b for b in group.biases if b is not None]
        trains = {w.meta["val"].requires_grad for w in weights}
        slots = [program.state[b.name] for b in biases]
        tied = {name for names in program.ties for name in names}
        fit = len(biases) == len(weights) == len(set(biases)) and all(
            s.kind == "parameter" and s.name not in tied
            and {b.meta["val"].requires_grad} == trains
            for s, b in zip(slots, biases, strict=True)
        )  # fmt: skip
        names = [program.state[w.name].name for w in weights]
        old = (*names, *(s.name for s in slots if fit))
        new = _name(program, names)
        below = Below(tuple(group.sizes), int(group.flipped), fit)
        return Replacement(self.name, old, (f"{new}_weight", f"{new}_bias")[: 1 + fit], below, below.apart)


TRANSPOSED = "read transposed"


def _alone(kind: dict[str, str], others: list[dict[str, str]]) -> str:
    """Why a linear is like no other of its input."""
    if not others:
        return "the other linears of its input stay"
    nearest = min(others, key=lambda k: sum(kind[what] != k[what] for what in kind))
    differ = [
        f"{what} {kind[what]}, {nearest[what]} with another" for what in kind if kind[what] != nearest[what]
    ]
    return "no other linear of its input is like it: " + "; ".join(differ)


def _merged(op: Ops, group: Group) -> tuple[list[Any], list[Any]]:
    """The results of one linear in the place of a group's, and the tensors made of parameters for it."""
    weights, sizes = list(group.weights), group.sizes
    tensors = [op.aten.cat.default(weights, *[1] * group.flipped)]
    x = group.linears[0].args[0]  # which is another node than in the plan where it was merged since
    given = [x, op.aten.permute.default(tensors[0], [1, 0]) if group.flipped else tensors[0]]
    if any(group.biases):
        like, pairs = next(filter(None, group.biases)), zip(group.biases, sizes, strict=True)
        biases = [op.aten.new_zeros.default(like, [n]) if b is None else b for b, n in pairs]
        tensors.append(op.aten.cat.default(biases))
        given.append(tensors[1])
    y = op.aten.linear.default(*given)
    last = y.meta["val"].dim() - 1
    equal = len(set(sizes)) == 1
    split = aten.split.Tensor if equal else aten.split_with_sizes.default
    parts = op(split, y, sizes[0] if equal else sizes, *[last] * (last > 0))
    return [op(operator.getitem, parts, i) for i in range(len(sizes))], tensors


def _replace(program: Program, one: Replacement, driver: Any, tensors: Sequence[fx.Node]) -> None:
    """Merged parameters in the place of those that `tensors` are made of; other readers take their part."""
    nodes = {
        s.name: n for n in program.graph.find_nodes(op="placeholder") if (s := program.state.get(n.name))
    }
    old = [nodes[name] for name in one.old]
    if not any(n.users for n in old):
        return
    mode, below = fake_mode(program.graph), one.forward
    assert mode is not None, "a program that was captured here"
    assert isinstance(below, Below), "as this pass made it"
    with mode, torch.no_grad():
        vals = below(*(n.meta["val"] for n in old))
    count = len(below.sizes)
    for i, new in enumerate(program.replace_parameters(one, vals)):
        mine = old[count * i :][:count]
        for tensor in tensors:
            if not tensor._erased and tensor.args[0] == mine:
                tensor.replace_all_uses_with(new, propagate_meta=False)
                program.graph.erase_node(tensor)
        first = min((u for n in mine for u in n.users), default=None)
        if first is not None:
            with program.graph.inserting_before(first):
                dim = 0 if i else below.dim
                parts = driver.call(first, aten.split_with_sizes.default, new, list(below.sizes), dim)
                for at, node in enumerate(mine):
                    node.replace_all_uses_with(
                        driver.call(first, operator.getitem, parts, at), propagate_meta=False
                    )


def _name(program: Program, names: Sequence[str]) -> str:
    """Where the merged parameter of these lies in the module, "layers.0.attn.q_k_v"."""
    paths = [n.split(".")[:-1] for n in names]
    common = 0
    while all(len(p) > common + 1 and p[common] == paths[0][common] for p in paths):
        common += 1
    found = ".".join([*paths[0][:common], "_".join("_".join(p[common:]) for p in paths)])
    known = {slot.name for slot in program.state.values()}
    while {f"{found}_weight", f"{found}_bias"} & known:
        found += "_"
    return found
