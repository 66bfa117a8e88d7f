"""Transformers language models: a line of a table is `name=(class, options)`."""

from __future__ import annotations

from typing import Any

from tests.zoo.transformers_small import VOCAB, B, Inputs, S, Table, ids, mask

MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
GROUPS = dict(n_group=1, topk_group=1, first_k_dense_replace=1)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"],
)
START = dict(decoder_start_token_id=2)
PHI3 = dict(pad_token_id=1, original_max_position_embeddings=64)

DECODERS: Table = dict(
    gpt2=("GPT2LMHeadModel", {}),
    llama=("LlamaForCausalLM", {}),
    mistral=("MistralForCausalLM", {}),
    qwen2=("Qwen2ForCausalLM", {}),
    qwen3=("Qwen3ForCausalLM", {}),
    gemma=("GemmaForCausalLM", {}),
    gemma2=("Gemma2ForCausalLM", dict(query_pre_attn_scalar=8)),
    gemma3=("Gemma3ForCausalLM", dict(query_pre_attn_scalar=8)),
    phi=("PhiForCausalLM", {}),
    phi3=("Phi3ForCausalLM", PHI3),
    opt=("OPTForCausalLM", dict(word_embed_proj_dim=32)),
    bloom=("BloomForCausalLM", {}),
    falcon=("FalconForCausalLM", {}),
    mpt=("MptForCausalLM", {}),
    gpt_neo=("GPTNeoForCausalLM", dict(attention_types=[[["global", "local"], 1]], window_size=4)),
    gpt_neox=("GPTNeoXForCausalLM", {}),
    gptj=("GPTJForCausalLM", {}),
    gpt_bigcode=("GPTBigCodeForCausalLM", {}),
    codegen=("CodeGenForCausalLM", {}),
    openai_gpt=("OpenAIGPTLMHeadModel", {}),
    ctrl=("CTRLLMHeadModel", dict(dff=64)),
    xglm=("XGLMForCausalLM", {}),
    biogpt=("BioGptForCausalLM", {}),
    stablelm=("StableLmForCausalLM", {}),
    starcoder2=("Starcoder2ForCausalLM", {}),
    persimmon=("PersimmonForCausalLM", {}),
    nemotron=("NemotronForCausalLM", {}),
    olmo=("OlmoForCausalLM", {}),
    olmo2=("Olmo2ForCausalLM", {}),
    olmo3=("Olmo3ForCausalLM", {}),
    cohere=("CohereForCausalLM", {}),
    cohere2=("Cohere2ForCausalLM", {}),
    granite=("GraniteForCausalLM", {}),
    glm=("GlmForCausalLM", {}),
    glm4=("Glm4ForCausalLM", {}),
    helium=("HeliumForCausalLM", {}),
    smollm3=("SmolLM3ForCausalLM", {}),
    exaone4=("Exaone4ForCausalLM", {}),
    ernie4_5=("Ernie4_5ForCausalLM", {}),
    arcee=("ArceeForCausalLM", {}),
    diffllama=("DiffLlamaForCausalLM", {}),
    bitnet=("BitNetForCausalLM", {}),
    modernbert_decoder=("ModernBertDecoderForCausalLM", {}),
)
RECURRENT: Table = dict(
    mamba=("MambaForCausalLM", {}),
    mamba2=("Mamba2ForCausalLM", dict(num_heads=8, n_groups=2, chunk_size=4)),
    falcon_mamba=("FalconMambaForCausalLM", {}),
    rwkv=("RwkvForCausalLM", dict(attention_hidden_size=32, context_length=64)),
    lfm2=("Lfm2ForCausalLM", dict(layer_types=["conv", "full_attention"])),
    recurrent_gemma=(
        "RecurrentGemmaForCausalLM",
        dict(lru_width=32, attention_window_size=16, num_hidden_layers=3),
    ),
    qwen3_next=("Qwen3NextForCausalLM", LINEAR),
    jamba=(
        "JambaForCausalLM",
        dict(
            attn_layer_period=2,
            attn_layer_offset=1,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
    ),
    bamba=(
        "BambaForCausalLM",
        dict(
            attn_layer_indices=[1],
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_chunk_size=4,
        ),
    ),
    zamba2=(
        "Zamba2ForCausalLM",
        dict(
            layers_block_type=["mamba", "hybrid"],
            num_mem_blocks=1,
            mamba_d_state=8,
            n_mamba_heads=8,
            mamba_headdim=8,
            chunk_size=4,
            attention_head_dim=16,
        ),
    ),
)
MOE: Table = dict(
    mixtral=("MixtralForCausalLM", {}),
    qwen2_moe=("Qwen2MoeForCausalLM", {}),
    qwen3_moe=("Qwen3MoeForCausalLM", {}),
    olmoe=("OlmoeForCausalLM", {}),
    gpt_oss=("GptOssForCausalLM", {}),
    deepseek_v2=("DeepseekV2ForCausalLM", MLA | GROUPS | dict(num_key_value_heads=4)),
    deepseek_v3=("DeepseekV3ForCausalLM", MLA | GROUPS | dict(num_key_value_heads=4)),
    granitemoe=("GraniteMoeForCausalLM", {}),
    glm4_moe=("Glm4MoeForCausalLM", GROUPS),
    ernie4_5_moe=("Ernie4_5_MoeForCausalLM", dict(moe_num_experts=4, moe_k=2)),
    phimoe=("PhimoeForCausalLM", {}),
    jetmoe=("JetMoeForCausalLM", dict(kv_channels=8, num_key_value_heads=2)),
    llama4=("Llama4ForCausalLM", dict(intermediate_size_mlp=64)),
)
ENCODERS: Table = dict(
    bert=("BertForMaskedLM", {}),
    roberta=("RobertaForMaskedLM", {}),
    xlm_roberta=("XLMRobertaForMaskedLM", {}),
    camembert=("CamembertForMaskedLM", {}),
    albert=("AlbertForMaskedLM", {}),
    distilbert=("DistilBertForMaskedLM", {}),
    electra=("ElectraForMaskedLM", {}),
    deberta=("DebertaForMaskedLM", {}),
    deberta_v2=(
        "DebertaV2ForMaskedLM",
        dict(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]),
    ),
    mpnet=("MPNetForMaskedLM", {}),
    modernbert=("ModernBertForMaskedLM", {}),
    xlnet=("XLNetLMHeadModel", {}),
    longformer=("LongformerForMaskedLM", dict(attention_window=4)),
    big_bird=("BigBirdForMaskedLM", dict(block_size=4, num_random_blocks=1)),
    nystromformer=(
        "NystromformerForMaskedLM",
        dict(num_landmarks=4, segment_means_seq_len=S, conv_kernel_size=3),
    ),
    fnet=("FNetForMaskedLM", {}),
    funnel=("FunnelForMaskedLM", dict(block_sizes=[1, 1], num_decoder_layers=1)),
    convbert=("ConvBertForMaskedLM", {}),
    squeezebert=("SqueezeBertForMaskedLM", {}),
    mobilebert=(
        "MobileBertForMaskedLM",
        dict(intra_bottleneck_size=32, true_hidden_size=32, num_feedforward_networks=2),
    ),
    megatron_bert=("MegatronBertForMaskedLM", {}),
    rembert=("RemBertForMaskedLM", dict(input_embedding_size=16, output_embedding_size=16)),
    roformer=("RoFormerForMaskedLM", {}),
    roberta_prelayernorm=("RobertaPreLayerNormForMaskedLM", {}),
    xlm=("XLMWithLMHeadModel", dict(emb_dim=32)),
    flaubert=("FlaubertWithLMHeadModel", dict(emb_dim=32)),
    ernie=("ErnieForMaskedLM", {}),
    esm=("EsmForMaskedLM", dict(position_embedding_type="rotary", mask_token_id=3)),
    nomic_bert=("NomicBertForMaskedLM", {}),
    mra=("MraForMaskedLM", {}),
    yoso=("YosoForMaskedLM", {}),
)
ENCODER_DECODERS: Table = dict(
    t5=("T5ForConditionalGeneration", START),
    mt5=("MT5ForConditionalGeneration", {}),
    umt5=("UMT5ForConditionalGeneration", {}),
    longt5=("LongT5ForConditionalGeneration", START | dict(local_radius=3)),
    switch_transformers=(
        "SwitchTransformersForConditionalGeneration",
        START | dict(num_sparse_encoder_layers=1),
    ),
    bart=("BartForConditionalGeneration", {}),
    mbart=("MBartForConditionalGeneration", {}),
    pegasus=("PegasusForConditionalGeneration", {}),
    led=(
        "LEDForConditionalGeneration",
        dict(
            attention_window=4,
            max_encoder_position_embeddings=64,
            max_decoder_position_embeddings=64,
        ),
    ),
    marian=("MarianMTModel", dict(decoder_vocab_size=VOCAB)),
    m2m_100=("M2M100ForConditionalGeneration", {}),
    blenderbot=("BlenderbotForConditionalGeneration", {}),
    blenderbot_small=("BlenderbotSmallForConditionalGeneration", {}),
    plbart=("PLBartForConditionalGeneration", {}),
    prophetnet=(
        "ProphetNetForConditionalGeneration",
        dict(
            num_encoder_layers=2,
            num_decoder_layers=2,
            num_encoder_attention_heads=4,
            num_decoder_attention_heads=4,
        ),
    ),
)


def text() -> dict[str, Any]:
    return {"input_ids": ids(B, S), "attention_mask": mask(), "labels": ids(B, S)}


def tokens() -> dict[str, Any]:
    """For models that take no mask."""
    return {"input_ids": ids(B, S), "labels": ids(B, S)}


def pair() -> dict[str, Any]:
    return text() | {"labels": ids(B, S - 2, seed=1)}


INPUTS: dict[str, Inputs] = dict.fromkeys(
    ("rwkv", "fnet", "mamba", "mamba2", "falcon_mamba", "nystromformer"), tokens
)
TABLES: list[tuple[str, Table, Inputs]] = [
    ("decoder", DECODERS, text),
    ("recurrent", RECURRENT, text),
    ("moe", MOE, text),
    ("encoder", ENCODERS, text),
    ("encoder-decoder", ENCODER_DECODERS, pair),
]
