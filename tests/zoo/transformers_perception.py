"""Transformers models of images, sound, series and several modalities at once."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from tests.zoo.transformers_small import IMAGE, SAMPLES, B, Inputs, S, Table, ids, mask, noise

WAVE = dict(
    conv_dim=(32, 32, 32),
    conv_kernel=(10, 3, 3),
    conv_stride=(5, 4, 4),
    num_feat_extract_layers=3,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=4,
    mask_time_length=2,
)
CAPTION = ("input_ids", "attention_mask", "pixel_values")
STAGES = dict(hidden_sizes=[16, 32], depths=[1, 1], embedding_size=16)
SWIN = dict(embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, patch_size=2)


VISION: Table = dict(
    vit=("ViTForImageClassification", {}),
    deit=("DeiTForImageClassification", {}),
    beit=("BeitForImageClassification", dict(use_relative_position_bias=True)),
    swin=("SwinForImageClassification", SWIN),
    swinv2=("Swinv2ForImageClassification", SWIN),
    convnext=("ConvNextForImageClassification", STAGES | dict(num_stages=2)),
    convnextv2=("ConvNextV2ForImageClassification", STAGES | dict(num_stages=2)),
    resnet=("ResNetForImageClassification", STAGES),
    regnet=("RegNetForImageClassification", STAGES | dict(groups_width=8)),
    efficientnet=(
        "EfficientNetForImageClassification",
        dict(width_coefficient=0.25, depth_coefficient=0.25, hidden_dim=320),
    ),
    mobilenet_v1=("MobileNetV1ForImageClassification", dict(depth_multiplier=0.25)),
    mobilenet_v2=("MobileNetV2ForImageClassification", dict(depth_multiplier=0.25)),
    mobilevit=(
        "MobileViTForImageClassification",
        dict(hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 32, 64], patch_size=2),
    ),
    segformer=(
        "SegformerForImageClassification",
        dict(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[16, 32],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            patch_sizes=[7, 3],
            strides=[4, 2],
        ),
    ),
    pvt_v2=(
        "PvtV2ForImageClassification",
        dict(
            num_encoder_blocks=4,
            hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 2, 4],
            image_size=64,
        ),
    ),
    poolformer=(
        "PoolFormerForImageClassification",
        dict(hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1], num_encoder_blocks=4),
    ),
    cvt=(
        "CvtForImageClassification",
        dict(embed_dim=[8, 16, 32], num_heads=[1, 2, 4], depth=[1, 2, 3]),
    ),
    levit=(
        "LevitForImageClassification",
        dict(
            hidden_sizes=[16, 24, 32],
            num_attention_heads=[2, 2, 4],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            image_size=64,
            patch_size=16,
        ),
    ),
    dinov2=("Dinov2ForImageClassification", {}),
    dinov2_registers=("Dinov2WithRegistersForImageClassification", {}),
    hiera=(
        "HieraForImageClassification",
        dict(
            embed_dim=8,
            image_size=[64, 64],
            depths=[1, 1, 1, 1],
            num_heads=[1, 2, 4, 8],
            patch_size=[7, 7],
        ),
    ),
    focalnet=(
        "FocalNetForImageClassification",
        dict(
            embed_dim=16,
            depths=[1, 1],
            hidden_sizes=[16, 32],
            focal_levels=[2, 2],
            focal_windows=[3, 3],
            patch_size=4,
        ),
    ),
    swiftformer=(
        "SwiftFormerForImageClassification",
        dict(depths=[1, 1, 1, 1], embed_dims=[8, 16, 16, 32], image_size=64),
    ),
    bit=("BitForImageClassification", STAGES | dict(num_groups=4)),
    data2vec_vision=("Data2VecVisionForImageClassification", {}),
    vit_msn=("ViTMSNForImageClassification", {}),
)
PIXELS: Table = dict(
    vit_mae=("ViTMAEForPreTraining", {}),
    dpt=(
        "DPTForDepthEstimation",
        dict(
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[8, 8, 16, 16],
            fusion_hidden_size=16,
        ),
    ),
    depth_segformer=(
        "GLPNForDepthEstimation",
        dict(
            hidden_sizes=[8, 16, 16, 32],
            depths=[1] * 4,
            num_attention_heads=[1, 2, 2, 4],
            decoder_hidden_size=16,
        ),
    ),
    swin2sr=(
        "Swin2SRForImageSuperResolution",
        dict(embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, upscale=2, patch_size=1),
    ),
    yolos=("YolosForObjectDetection", dict(image_size=[32, 32], num_detection_tokens=4)),
    sam_vision=("SamVisionModel", dict(output_channels=16, global_attn_indexes=[1], window_size=2)),
)
WAVES: Table = dict(
    wav2vec2=("Wav2Vec2ForCTC", WAVE),
    hubert=("HubertForCTC", WAVE),
    wavlm=("WavLMForCTC", WAVE),
    sew=("SEWForCTC", WAVE),
    sew_d=("SEWDForCTC", WAVE | dict(position_buckets=8)),
    unispeech=("UniSpeechForCTC", WAVE),
    data2vec_audio=("Data2VecAudioForCTC", WAVE | dict(num_conv_pos_embeddings=2)),
    wav2vec2_conformer=("Wav2Vec2ConformerForCTC", WAVE),
)
SPEECH: Table = dict(
    whisper=("WhisperForConditionalGeneration", dict(num_mel_bins=16)),
    speech_to_text=(
        "Speech2TextForConditionalGeneration",
        dict(input_feat_per_channel=16, conv_channels=32, max_source_positions=128),
    ),
)
OTHERS: Table = dict(
    ast=("ASTForAudioClassification", dict(max_length=64, num_mel_bins=16)),
    moonshine=(
        "MoonshineForConditionalGeneration",
        dict(
            encoder_num_hidden_layers=2,
            decoder_num_hidden_layers=2,
            encoder_num_attention_heads=4,
            decoder_num_attention_heads=4,
            encoder_num_key_value_heads=4,
            decoder_num_key_value_heads=4,
        ),
    ),
    encodec=(
        "EncodecModel",
        dict(
            num_filters=8,
            upsampling_ratios=[4, 2],
            codebook_size=16,
            codebook_dim=32,
            num_lstm_layers=1,
        ),
    ),
    clip=("CLIPModel", {}),
    siglip=("SiglipModel", {}),
    chinese_clip=("ChineseCLIPModel", {}),
    altclip=("AltCLIPModel", dict(text_config=dict(project_dim=32))),
    metaclip=("MetaClip2Model", {}),
    clipseg=(
        "CLIPSegForImageSegmentation",
        dict(extract_layers=[0, 1], reduce_dim=16, projection_dim=32, decoder_num_attention_heads=4),
    ),
    groupvit=(
        "GroupViTModel",
        dict(
            vision_config=dict(depths=[1, 1, 1], num_group_tokens=[8, 4, 0], num_output_groups=[8, 4, 0]),
            projection_intermediate_dim=32,
        ),
    ),
    blip=("BlipForConditionalGeneration", dict(text_config=dict(encoder_hidden_size=32))),
    git=("GitForCausalLM", {}),
    owlvit=("OwlViTModel", {}),
    vilt=("ViltForQuestionAnswering", {}),
    visual_bert=("VisualBertForPreTraining", dict(visual_embedding_dim=16)),
    layoutlm=("LayoutLMForMaskedLM", dict(max_2d_position_embeddings=128)),
    layoutlmv3=(
        "LayoutLMv3ForSequenceClassification",
        dict(
            max_2d_position_embeddings=128,
            coordinate_size=4,
            shape_size=8,
            visual_embed=True,
            input_size=IMAGE,
        ),
    ),
    perceiver=(
        "PerceiverForMaskedLM",
        dict(
            max_position_embeddings=S,
            num_latents=8,
            d_latents=32,
            num_blocks=1,
            num_self_attends_per_block=2,
            num_self_attention_heads=4,
            num_cross_attention_heads=4,
            qk_channels=32,
            v_channels=32,
        ),
    ),
    llava=(
        "LlavaForConditionalGeneration",
        dict(
            text_config=dict(model_type="llama"),
            vision_config=dict(model_type="clip_vision_model"),
            image_token_id=5,
        ),
    ),
    paligemma=(
        "PaliGemmaForConditionalGeneration",
        dict(
            text_config=dict(model_type="gemma"),
            vision_config=dict(model_type="siglip_vision_model"),
            image_token_id=5,
            projection_dim=32,
        ),
    ),
    qwen2_vl=(
        "Qwen2VLForConditionalGeneration",
        dict(
            image_token_id=5,
            video_token_id=6,
            vision_start_token_id=7,
            vision_end_token_id=8,
            text_config=dict(
                rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])
            ),
            vision_config=dict(depth=2, embed_dim=32, hidden_size=32, mlp_ratio=2),
        ),
    ),
    detr=(
        "DetrForObjectDetection",
        dict(
            num_queries=4,
            backbone_config=dict(model_type="resnet", **STAGES, out_features=["stage2"]),
        ),
    ),
    patchtst=(
        "PatchTSTForPrediction",
        dict(
            context_length=32,
            patch_length=8,
            patch_stride=8,
            prediction_length=8,
            num_input_channels=2,
        ),
    ),
    time_series=(
        "TimeSeriesTransformerModel",
        dict(prediction_length=4, context_length=8, lags_sequence=[1, 2], num_time_features=1),
    ),
)


def image(size: int = IMAGE, batch: int = B) -> dict[str, Any]:
    return {"pixel_values": noise(batch, 3, size, size), "labels": torch.arange(batch) % 2}


def pixels(size: int = IMAGE) -> dict[str, Any]:
    return {"pixel_values": noise(B, 3, size, size)}


def wave() -> dict[str, Any]:
    return {"input_values": noise(B, SAMPLES), "labels": ids(B, 4)}


def speech(*shape: int) -> dict[str, Any]:
    return {"input_features": noise(B, *shape), "labels": ids(B, S)}


def multimodal(*names: str) -> dict[str, Any]:
    """Those of the usual inputs of models of several modalities that the names choose."""
    every = {
        "input_ids": ids(B, S),
        "attention_mask": mask(),
        "pixel_values": noise(B, 3, IMAGE, IMAGE),
        "labels": ids(B, S),
        "bbox": torch.arange(4).expand(B, S, 4) * 9 + torch.arange(S)[:, None],
        "visual_embeds": noise(B, 4, 16),
        "return_loss": True,
        "conditional_pixel_values": noise(B, 3, IMAGE, IMAGE, seed=1),
    }
    return {name: every[name] for name in names}


def prompt(images: int = (IMAGE // 8) ** 2, token: int = 5) -> dict[str, Any]:
    """A prompt that starts with the places of the image's patches."""
    places = torch.full((B, images), token)
    input_ids = torch.cat([places, ids(B, S).clamp(min=10)], dim=1)
    return {"input_ids": input_ids, "pixel_values": noise(B, 3, IMAGE, IMAGE), "labels": input_ids}


def patches() -> dict[str, Any]:
    """Two images of 4 x 4 flattened patches, which the model merges 2 x 2."""
    x = prompt(16 // 4)
    return x | {
        "pixel_values": noise(B * 16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * B),
        "mm_token_type_ids": (x["input_ids"] == 5).int(),
    }


def series() -> dict[str, Any]:
    return {
        "past_values": noise(B, 10),
        "past_time_features": noise(B, 10, 1),
        "past_observed_mask": torch.ones(B, 10),
        "future_values": noise(B, 4),
        "future_time_features": noise(B, 4, 1),
    }


INPUTS: dict[str, Inputs] = {
    "ast": lambda: {"input_values": noise(B, 64, 16), "labels": torch.tensor([0, 1])},
    "moonshine": wave,
    "encodec": lambda: {"input_values": noise(B, 1, 640)},
    "clip": partial(multimodal, *CAPTION, "return_loss"),
    "siglip": partial(multimodal, "input_ids", "pixel_values", "return_loss"),
    "chinese_clip": partial(multimodal, *CAPTION, "return_loss"),
    "altclip": partial(multimodal, *CAPTION, "return_loss"),
    "metaclip": partial(multimodal, *CAPTION, "return_loss"),
    "clipseg": partial(multimodal, *CAPTION, "conditional_pixel_values"),
    "groupvit": partial(multimodal, *CAPTION, "return_loss"),
    "blip": partial(multimodal, *CAPTION, "labels"),
    "git": partial(multimodal, *CAPTION, "labels"),
    "owlvit": partial(multimodal, *CAPTION),
    "vilt": partial(multimodal, *CAPTION),
    "visual_bert": partial(multimodal, "input_ids", "attention_mask", "visual_embeds"),
    "layoutlm": partial(multimodal, "input_ids", "attention_mask", "bbox", "labels"),
    "layoutlmv3": partial(multimodal, *CAPTION, "bbox"),
    "perceiver": lambda: {"inputs": ids(B, S), "attention_mask": mask(), "labels": ids(B, S)},
    "llava": prompt,
    "paligemma": prompt,
    "qwen2_vl": patches,
    "detr": partial(pixels, 64),
    "patchtst": lambda: {"past_values": noise(B, 32, 2), "future_values": noise(B, 8, 2)},
    "time_series": series,
    "speech_to_text": partial(speech, 128, 16),
    "pvt_v2": partial(image, 64),
    "levit": partial(image, 64, 4),  # its head normalises the batch: of two, all gradients are rounding
    "hiera": partial(image, 64),
    "swiftformer": partial(image, 64),
    "cvt": partial(image, 64),
    "mobilevit": partial(image, 64),
    "depth_segformer": partial(pixels, 64),
}
TABLES: list[tuple[str, Table, Inputs]] = [
    ("vision", VISION, image),
    ("vision", PIXELS, pixels),
    ("audio", WAVES, wave),
    ("audio", SPEECH, partial(speech, 16, 128)),
    ("multimodal", OTHERS, pixels),
]
