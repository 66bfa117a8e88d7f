"""Small models of every kind whose activations a training step keeps, with a batch each."""

import torch
import torch.nn.functional as F
from torch import nn

from tests.zoo.torchvision_shim import importable

VOCABULARY, B, S = 200, 4, 32


def ids(*size):
    return torch.randint(0, VOCABULARY, size)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_layer=3, n_embd=64, n_head=4, vocab_size=VOCABULARY, n_positions=64, use_cache=False
    )
    return GPT2LMHeadModel(config), {"input_ids": ids(B, S), "labels": ids(B, S)}


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        num_hidden_layers=3,
        hidden_size=64,
        intermediate_size=256,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
    )
    return BertForSequenceClassification(config), {
        "input_ids": ids(B, S),
        "labels": torch.randint(0, 2, (B,)),
    }


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=3, hidden_size=64, intermediate_size=160, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=VOCABULARY, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": ids(B, S), "labels": ids(B, S)}


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=64, d_kv=16, d_ff=128, num_layers=2, num_decoder_layers=2, num_heads=4, vocab_size=VOCABULARY,
        use_cache=False, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config), {"input_ids": ids(B, S), "labels": ids(B, S)}


def vit():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=48, depth=4)
    return model, {"x": torch.randn(B, 3, 48, 48)}


def resnet():
    import timm

    return timm.create_model("resnet18", num_classes=10), {"x": torch.randn(B, 3, 64, 64)}


class Convolutions(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        layers = []
        for i in (inner, outer):
            layers += [nn.Conv2d(i, outer, 3, padding=1), nn.BatchNorm2d(outer), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return self.layers(x)


class UNet(nn.Module):
    """Long skips: what the first layers make is read by the last."""

    def __init__(self, widths=(8, 16, 32, 64)):
        super().__init__()
        self.down = nn.ModuleList(Convolutions(i, o) for i, o in zip((3, *widths), widths, strict=False))
        pairs = list(zip(widths[::-1], widths[-2::-1], strict=False))
        self.up = nn.ModuleList(Convolutions(i + o, o) for i, o in pairs)
        self.out = nn.Conv2d(widths[0], 1, 1)

    def forward(self, x):
        skips = []
        for layer in self.down[:-1]:
            skips.append(layer(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.down[-1](x)
        for layer in self.up:
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return self.out(x).square().mean()


def unet():
    return UNet(), {"x": torch.randn(B, 3, 48, 48)}


def made(name):
    """The model of that name, and a batch for it as keyword arguments."""
    torch.manual_seed(0)
    with importable():  # transformers looks for torchvision
        return MODELS[name]()


MODELS = {m.__name__: m for m in (gpt2, bert, llama, t5, vit, resnet, unet)}


def loss_of(result):
    """The number that a step begins backward from."""
    found = result.loss if hasattr(result, "loss") else result
    return found if found.numel() == 1 else found.square().mean()
