"""Models in stages in processes of their own, and the steps of one process that they are held beside."""

from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import fxaccel
from fxaccel.passes import Partition
from tests.passes.partition_models import Attention, UNet, W
from tests.zoo.torchvision_shim import importable

WORDS, LENGTH = 20, 7
RATE = 0.05


class Language(torch.nn.Module):
    """A language model whose head is its embedding, with a skip over all stages."""

    def __init__(self, layers):
        super().__init__()
        self.embed = torch.nn.Embedding(WORDS, W)
        self.layers = torch.nn.ModuleList(Attention() for _ in range(layers))
        self.head = torch.nn.Linear(W, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, keep):
        size = ids.shape[1]
        mask = torch.ones(size, size, dtype=torch.bool, device=ids.device).tril() & keep[:, None].bool()
        x = self.embed(ids)
        first = x
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x + first)


def _of_transformers(name, layers):
    import transformers

    sizes = {
        "num_hidden_layers": layers, "hidden_size": W, "num_attention_heads": 2, "intermediate_size": 2 * W,
        "vocab_size": WORDS, "use_cache": False, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    if name == "gpt2":
        config = transformers.GPT2Config(
            n_layer=layers, n_embd=W, n_head=2, vocab_size=WORDS, use_cache=False, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    if name == "t5":
        config = transformers.T5Config(
            num_layers=(layers + 1) // 2, num_decoder_layers=(layers + 1) // 2, d_model=W, d_kv=4,
            num_heads=2, d_ff=2 * W, vocab_size=WORDS, decoder_start_token_id=0, use_cache=False,
            dropout_rate=0.0,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config)
    if name == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes))


MODELS = ("tied", "unet", "gpt2", "bert", "t5", "llama")
OWN_LOSS = ("bert", "t5")


def made(name, layers, batch):
    """A model in float64, the arguments of a call, and a target where the model has no loss of its own."""
    torch.manual_seed(0)
    if name == "unet":
        model, x = UNet(max(3, layers // 2)), torch.randn(batch, W, dtype=torch.float64)
        return model.double().train(), {"x": x}, torch.randn(batch, W, dtype=torch.float64)
    ids = torch.randint(0, WORDS, (batch, LENGTH))
    if name == "tied":
        model, keep = Language(layers), torch.ones_like(ids)
        keep[::2, 5:] = 0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0  # masks of microbatches are not those of the batch
        return model.double().train(), {"ids": ids, "keep": keep}, torch.randint(0, WORDS, ids.shape)
    given, target = {"input_ids": ids}, torch.randint(0, WORDS, ids.shape)
    if name in OWN_LOSS:  # those of the others are in float32
        given, target = {**given, "labels": target}, None
    if name == "t5":
        given["decoder_input_ids"] = torch.randint(0, WORDS, ids.shape)
    with importable():  # transformers looks for torchvision
        return _of_transformers(name, layers).double().train(), given, target


def loss_of(result, target):
    """Of a result and a target."""
    if target is None:
        return result["loss"]
    if target.dtype.is_floating_point:
        return F.mse_loss(result, target)
    logits = result if isinstance(result, torch.Tensor) else result["logits"]
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def learned(parameters, step, steps):
    """Losses and gradients of some steps, by the names of parameters."""
    named = list(parameters)
    optimizer = torch.optim.SGD(list(dict.fromkeys(p for _, p in named)), RATE)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = step()
        found.append((loss, {n: p.grad.clone() for n, p in named if p.grad is not None}))
        optimizer.step()
    return found


def one_process(model, args, target, steps):
    """What one process learns."""

    def step():
        loss = loss_of(model(**args), target)
        loss.backward()
        return loss.detach()

    return learned(model.named_parameters(remove_duplicate=False), step, steps)


def saved(model, args, file, stages, passes=()):
    """The model cut into stages, in a file; what was cut."""
    fast = fxaccel.accelerate(model, [*passes, Partition(stages=stages)], strict=True, check=False)
    fast(**args)
    fast.save(file)
    return fast


def worker(rank, size, folder, runs):
    """Each run is (file, schedule, microbatches, options of made, steps)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    found = {}
    for file, schedule, microbatches, options, steps in runs:
        args, target = torch.load(folder / f"{options[0]}.pt", weights_only=True)
        fast = fxaccel.load(folder / file).train()
        loss = None if target is None else loss_of
        mine = fast.schedule(schedule, microbatches, loss=loss, timeout=120)
        step = lambda mine=mine, args=args, target=target: mine.step(**args, target=target)  # noqa: E731
        found[file, schedule] = learned(mine.named_parameters(), step, steps), list(mine.state_dict())
        mine.close()
    torch.save(found, folder / f"found{rank}.pt")
    dist.destroy_process_group()


def run(size, folder, runs):
    """All runs in as many processes; what each has found."""
    mp.start_processes(worker, (size, folder, runs), nprocs=size, start_method="spawn")
    return [torch.load(folder / f"found{rank}.pt") for rank in range(size)]


def prepared(folder, names, layers, batch, cuts, steps):
    """Files of models in so many stages, and what one process learns of each."""
    found = {}
    for name in names:
        model, args, target = made(name, layers, batch)
        torch.save((args, target), folder / f"{name}.pt")
        for stages in cuts:
            saved(model, args, folder / f"{name}{stages}.fxa", stages)
        want = one_process(model, args, target, steps)
        tensors = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
        found[name] = SimpleNamespace(names=set(model.state_dict()), want=want, tensors=tensors)
    return found


def agree(ranks, key, one):
    """Losses of the last stage, gradients of all, and the names of all state are those of one process."""
    found = [rank[key] for rank in ranks]
    assert set().union(*(names for _, names in found)) == one.names
    for step, (wanted, gradients) in enumerate(one.want):
        (loss,) = (steps[step][0] for steps, _ in found if steps[step][0] is not None)
        torch.testing.assert_close(loss, wanted, rtol=1e-11, atol=1e-13)
        seen = set()
        for steps, _ in found:
            for name, gradient in steps[step][1].items():
                torch.testing.assert_close(
                    gradient, gradients[name], rtol=1e-9, atol=1e-12, msg=f"{key} {name}"
                )
                seen.add(one.tensors[name])
        assert seen == set(one.tensors.values())
