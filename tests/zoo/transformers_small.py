"""How a transformers model is made small: configs, the builder, and inputs from fixed seeds.

Every config field that `SMALL` names is set to the value there, in nested configs too; the options
of an entry go on top. The rest stays at the library's default, `use_cache` and dropout included, so
that a model behaves as its user would find it.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.zoo.torchvision_shim import importable

Inputs = Callable[[], dict[str, Any]]
Table = dict[str, tuple[str, dict[str, Any]]]

B, S, VOCAB, IMAGE, SAMPLES = 2, 12, 99, 32, 4000

SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "entity_vocab_size", "target_vocab_size"), VOCAB),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "dim"), 32),
    **dict.fromkeys(("decoder_hidden_size", "projection_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("decoder_num_hidden_layers",), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_num_attention_heads",), 4),
    "num_key_value_heads": 2,
    **dict.fromkeys(("head_dim", "d_kv", "d_head"), 8),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "d_inner", "hidden_dim"), 64),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size"), 64),
    **dict.fromkeys(("decoder_intermediate_size", "encoder_intermediate_size"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **dict.fromkeys(("max_source_positions", "max_target_positions", "sliding_window"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "n_shared_experts": 1,
    "state_size": 8,
    "rotary_dim": 4,
    "image_size": IMAGE,
    "patch_size": 8,
    "type_vocab_size": 2,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}


def small(config_class: type, options: dict[str, Any]) -> Any:
    """A config with `SMALL` values for the fields it has, then the options, nested ones too."""
    known = {field.name for field in dataclasses.fields(config_class)}
    chosen = {name: value for name, value in SMALL.items() if name in known}
    for alias, name in config_class.attribute_map.items():
        if alias in SMALL and name not in chosen:
            chosen[name] = SMALL[alias]
    for name, kind in config_class.sub_configs.items():
        inner = dict(options.get(name, {}))
        if "model_type" in inner:
            kind = transformers.CONFIG_MAPPING[inner.pop("model_type")]
        if dataclasses.is_dataclass(kind):
            chosen[name] = small(kind, inner)
            options = {key: value for key, value in options.items() if key != name}
    return config_class(**chosen | options)


def build(class_name: str, options: dict[str, Any], attention: str | None = None) -> nn.Module:
    """The model of that transformers class; `attention` names an implementation, as users may."""
    with importable():
        importlib.import_module("transformers.image_utils")  # imports torchvision, if installed
    model_class = getattr(transformers, class_name)
    config = small(model_class.config_class, options)
    if attention is not None:
        config._attn_implementation = attention
    torch.manual_seed(0)
    return model_class(config)


def ids(*shape: int, seed: int = 0) -> Tensor:
    """Token ids from 3 up: 0, 1 and 2 have meanings in some configs."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, shape, generator=generator)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask() -> Tensor:
    """The second row is 3 tokens shorter than the first."""
    return (torch.arange(S) < torch.tensor([[S], [S - 3]])).long()
