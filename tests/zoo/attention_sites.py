"""The attentions of the zoo's models, as fuse-attention must report them: kind by kind, how many.

`SITES` has a model with the zoo's inputs, padded where it takes a mask; its kinds are those of "sdpa" and of
"eager" alike. What is not raised whole stands in `EXCEPTIONS`, by case, with the reason of the report.
A case is "name implementation", then "unmasked" for inputs without a mask and "train" for training mode.
"""

from __future__ import annotations

Kinds = dict[str, int]

GROUPS = ", 4 query heads on 2"
FULL, PADDED = {"full": 2}, {"key padding": 2}
CAUSAL, GROUPED = {"causal, key padding": 2}, {f"causal, key padding{GROUPS}": 2}
WINDOWED = {f"causal, window 64, key padding{GROUPS}": 2}
MULTI_QUERY = {"causal, key padding, 4 query heads on 1": 2}
ALIBI = {"causal, key padding, a bias of keys": 2}
# Encoder, decoder and what joins them; the mask is the encoder's.
PAIRED, SPOKEN = {"key padding": 4, "causal": 2}, {"full": 4, "causal": 2}
RELATIVE = {"key padding, relative bias": 2, "causal, relative bias": 2, "key padding": 2}


def each(names: str, kinds: Kinds) -> dict[str, Kinds]:
    return dict.fromkeys(names.split(), kinds)


SITES: dict[str, Kinds] = {
    **each("gpt2 opt gpt_neox gptj codegen ctrl biogpt persimmon jetmoe deepseek_v2 deepseek_v3", CAUSAL),
    **each("llama qwen2 qwen3 gemma phi stablelm nemotron olmo olmo2 cohere granite glm glm4", GROUPED),
    **each("helium smollm3 ernie4_5 arcee bitnet qwen2_moe qwen3_moe olmoe granitemoe", GROUPED),
    **each("glm4_moe ernie4_5_moe", GROUPED),
    **each("mistral gemma3 phi3 starcoder2 olmo3 cohere2 exaone4 mixtral phimoe", WINDOWED),
    **each("falcon gpt_bigcode", MULTI_QUERY),
    **each("bloom mpt", ALIBI),
    "diffllama": {f"causal, key padding{GROUPS}": 4},
    "gemma2": {
        f"causal, key padding{GROUPS}, softcap": 1,
        f"causal, window 64, key padding{GROUPS}, softcap": 1,
    },
    "llama4": {f"causal, key padding, documents{GROUPS}": 2},
    "modernbert_decoder": {"causal, key padding": 1, "causal, window 64, key padding": 1},
    "gpt_oss": {
        f"causal, key padding{GROUPS}, sinks": 1,
        f"causal, window 64, key padding{GROUPS}, sinks": 1,
    },
    **each("lfm2 recurrent_gemma jamba zamba2", {f"causal, key padding{GROUPS}": 1}),
    **each("bert roberta xlm_roberta camembert albert distilbert electra ernie esm nomic_bert", PADDED),
    **each("convbert squeezebert mobilebert megatron_bert rembert roformer xlm flaubert", PADDED),
    "mpnet": {"key padding, relative bias": 2},
    "funnel": {"an additive index function, an additive index function, an additive index function": 3},
    "modernbert": {"key padding": 1, "keys up to q + 64, window 65, key padding": 1},
    "deberta": {"data of queries and keys": 2},
    "deberta_v2": {"data of queries and keys, a bias tensor": 2},
    **each("t5 mt5 umt5", RELATIVE),
    **each("bart mbart pegasus marian m2m_100 blenderbot plbart", PAIRED),
    **each("whisper moonshine speech_to_text", SPOKEN),
    **each("vit deit dinov2 dinov2_registers data2vec_vision vit_msn yolos segformer ast", FULL),
    **each("vit_mae dpt pvt_v2 hiera", {"full": 4}),
    "mobilevit": {"full": 9},
    "cvt": {"full": 6},
    "beit": {"a bias tensor": 2},
    "swin": {"a bias tensor": 4},
    # Every other layer's windows are shifted, and the model adds their mask twice.
    "swinv2": {
        "a bias tensor": 2,
        "an additive index function, an additive index function, a bias tensor": 2,
    },
    "sam_vision": {"a bias tensor": 2},
    "clip": {"causal, key padding": 2, "full": 2},
}

IMPLEMENTATIONS = ("sdpa", "eager")
# Models that transformers refuses to build with attn_implementation="sdpa".
EAGER_ONLY = {
    "bloom", "codegen", "gemma2", "gpt_neo", "gpt_oss", "gptj", "mpt", "openai_gpt", "xglm",
    "convbert", "deberta", "deberta_v2", "flaubert", "funnel", "led", "longformer", "megatron_bert",
    "mpnet", "rembert", "roformer", "squeezebert", "xlm", "xlnet",
    "cvt", "hiera", "longt5", "mobilevit", "pvt_v2", "speech_to_text", "swinv2",
}  # fmt: skip
# Decoders whose inputs have no mask: the same kinds, less the padding.
UNMASKED: dict[str, Kinds] = {
    **{
        name: {kind.replace(", key padding", ""): count for kind, count in kinds.items()}
        for name, kinds in SITES.items()
        if all(kind.startswith("causal, ") for kind in kinds)
    },
    "bloom": {"causal, an additive index function": 2},  # ALiBi over positions that nothing shifts
    "llama4": {f"causal, chunks{GROUPS}": 2},
    "xglm": {"causal": 2},
}
TRAINED: dict[str, Kinds] = {
    "gpt2 sdpa train": {"causal, key padding, dropout": 2},
    "gpt2 eager train": {"causal, key padding, dropout": 2},
    "gpt2 eager unmasked train": {"causal, dropout": 2},
    "t5 eager unmasked train": {
        "relative bias, dropout": 2,
        "causal, relative bias, dropout": 2,
        "full, dropout": 2,
    },
    "t5 eager train": {
        "key padding, relative bias, dropout": 2,
        "causal, relative bias, dropout": 2,
        "key padding, dropout": 2,
    },
    # The encoder's mask fills the bias, which thus learns nothing from rows without keys.
    "t5 sdpa train": {
        "a bias tensor, dropout": 2,
        "causal, relative bias, dropout": 2,
        "key padding, dropout": 2,
    },
    "bert sdpa train": {"key padding, dropout": 2},
    "bert eager train": {"key padding, dropout": 2},
    "mpnet eager train": {"key padding, relative bias, dropout": 2},
    "llama eager train": GROUPED,
    "mixtral sdpa train": WINDOWED,
    "gpt_oss eager train": SITES["gpt_oss"],
    "bloom eager train": ALIBI,
    "bart eager train": PAIRED,
    "swin sdpa train": SITES["swin"],
    "vit eager train": FULL,
}

_CLAMPED = "a row may see no key, and its scores are clamped"
_FILLS = "a row may see no key, and then 2 masks, one of which fills with -3.40282e+38, leave some"
_HALVES = "the intermediate aten.softmax.int is also read by aten.matmul"  # one softmax, two values
_CHUNKS = "aten.pad stands between the softmax and the product with v"  # a band of keys, laid out as a table
EXCEPTIONS: dict[str, str] = {
    "xglm eager": _CLAMPED,
    "gpt_neo eager": _FILLS,
    "gpt_neo eager unmasked": _FILLS,
    "openai_gpt eager": "the scores are multiplied by a tensor, aten.slice.Tensor, that differs from key",
    "diffllama eager": _HALVES,
    "diffllama eager unmasked": _HALVES,
    "xlnet eager": "a row may see no key, and its scores then differ by what -1e+30 does not absorb",
    "longt5 eager": "what is done to the scores depends on sizes that the kernel has no words for",
    "longformer eager": _CHUNKS,
    "led eager": _CHUNKS,
}
A_LAYER = {"diffllama": 2}  # two softmaxes, of which one is taken from the other
# The heads of a group are no neighbours; latent attention has keys for every head, whatever the config says.
NOT_GROUPED = ("jetmoe", "deepseek_v2", "deepseek_v3")

TIMM: dict[str, Kinds] = {
    **each("vit vit_registers deit deit3 eva naflexvit", FULL),
    "vit_siglip": {"full": 3},
    **each("vit_parallel xcit pvt_v2 hiera tnt", {"full": 4}),
    "davit": {"full": 8},
    **each("pit nest", {"full": 12}),
    "twins": {"full": 18},
    **each("vit_relpos beit beitv2", {"a bias tensor": 2}),
    **each("swin swinv2", {"a bias tensor": 2, "a bias tensor, a bias tensor": 2}),
}
TIMM_EXCEPTIONS: dict[str, str] = {
    # Outlook attention: a linear layer makes the weights, and its product stands for that of q and k.
    "volo": "aten.permute stands between the product of q and k and the softmax",
    # A linear layer mixes the weights of the heads.
    "cait": "aten.permute stands between the softmax and the product with v",
    "mvitv2": "is also read by aten.slice.Tensor",
}


def cases(table: dict[str, Kinds], form: str = "") -> list[str]:
    """Every model of the table in each implementation that it has, less the exceptions."""
    every = [
        f"{name} {implementation} {form}".rstrip()
        for name in table
        for implementation in IMPLEMENTATIONS
        if implementation == "eager" or name not in EAGER_ONLY
    ]
    return [case for case in every if case not in EXCEPTIONS]
