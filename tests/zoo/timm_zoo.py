"""timm models made small: short stages, few channels, small images; random weights, no download.

A line is `name=(architecture, image size, options)`. Where an architecture takes `embed_dim` and
`depth`, a shared recipe sets them; the convolutional ones keep their own width.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from tests.zoo.entry import Entry
from tests.zoo.torchvision_shim import importable

B, CLASSES = 2, 10

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4)
STAGES = dict(depths=(1, 1, 1, 1), dims=(8, 16, 16, 32))
SWIN = dict(img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4))
RESNET = dict(layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_width=8)

CNN: dict[str, tuple[str, int, dict[str, Any]]] = dict(
    resnet18=("resnet18", 32, RESNET),
    resnet50=("resnet50", 32, RESNET),
    resnext50=("resnext50_32x4d", 32, RESNET | dict(cardinality=4)),
    seresnet18=("seresnet18", 32, RESNET),
    ecaresnet50=("ecaresnet50t", 32, RESNET),
    resnetv2=("resnetv2_50", 32, dict(layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), stem_chs=16)),
    resnest=("resnest14d", 64, {}),
    res2net=("res2net50_26w_4s", 32, {}),
    skresnet=("skresnet18", 32, {}),
    densenet=("densenet121", 32, dict(growth_rate=8, block_config=(2, 2, 2, 2))),
    efficientnet_b0=("efficientnet_b0", 32, {}),
    efficientnetv2=("efficientnetv2_rw_t", 32, {}),
    mobilenetv2=("mobilenetv2_050", 32, {}),
    mobilenetv3=("mobilenetv3_small_050", 32, {}),
    mobilenetv4=("mobilenetv4_conv_small_050", 32, {}),
    mnasnet=("mnasnet_050", 32, {}),
    mixnet=("mixnet_s", 32, {}),
    ghostnet=("ghostnet_050", 32, {}),
    hardcorenas=("hardcorenas_a", 32, {}),
    regnetx=("regnetx_002", 32, {}),
    regnety=("regnety_002", 32, {}),
    convnext=("convnext_atto", 32, STAGES),
    convnextv2=("convnextv2_atto", 32, STAGES),
    inception_next=("inception_next_atto", 32, STAGES),
    inception_v3=("inception_v3", 96, {}),
    xception=("xception41", 64, {}),
    dla=("dla46_c", 32, {}),
    hrnet=("hrnet_w18_small", 64, {}),
    nfnet=("nf_regnet_b0", 32, {}),
    dm_nfnet=("nfnet_l0", 32, {}),
    repvgg=("repvgg_a0", 32, {}),
    mobileone=("mobileone_s0", 32, {}),
    rexnet=("rexnet_100", 32, {}),
    tresnet=("tresnet_m", 64, {}),
    vovnet=("ese_vovnet19b_slim", 32, {}),
    cspnet=("cspresnet50", 64, {}),
    selecsls=("selecsls42", 64, {}),
    lcnet=("lcnet_050", 32, {}),
    hgnet=("hgnetv2_b0", 32, {}),
    starnet=("starnet_s1", 64, {}),
    fasternet=("fasternet_t0", 64, {}),
)
VITS: dict[str, tuple[str, int, dict[str, Any]]] = dict(
    vit=("vit_tiny_patch16_224", 32, VIT),
    vit_registers=("vit_small_patch14_reg4_dinov2", 32, VIT),
    vit_relpos=("vit_relpos_small_patch16_224", 32, VIT),
    vit_siglip=("vit_base_patch16_siglip_224", 32, VIT),
    vit_parallel=("vit_small_patch16_18x2_224", 32, VIT),
    deit=("deit_tiny_distilled_patch16_224", 32, VIT),
    deit3=("deit3_small_patch16_224", 32, VIT),
    beit=("beit_base_patch16_224", 32, VIT),
    beitv2=("beitv2_base_patch16_224", 32, VIT),
    eva=("eva02_tiny_patch14_224", 32, VIT),
    cait=("cait_xxs24_224", 32, VIT),
    xcit=("xcit_nano_12_p16_224", 32, VIT),
    swin=("swin_tiny_patch4_window7_224", 32, SWIN),
    swinv2=("swinv2_tiny_window8_256", 32, SWIN),
    swinv2_cr=("swinv2_cr_tiny_224", 64, SWIN | dict(img_size=64)),
    tnt=(
        "tnt_s_legacy_patch16_224",
        32,
        dict(img_size=32, embed_dim=32, inner_dim=16, depth=2, num_heads_outer=4),
    ),
    pit=("pit_ti_224", 64, dict(img_size=64)),
    twins=("twins_svt_small", 64, dict(img_size=64)),
    crossvit=("crossvit_tiny_240", 240, {}),
    hiera=("hiera_tiny_224", 64, dict(img_size=(64, 64), embed_dim=16, stages=(1, 1, 1, 1))),
    mvitv2=("mvitv2_tiny", 64, dict(img_size=64)),
    pvt_v2=("pvt_v2_b0", 64, dict(depths=(1, 1, 1, 1))),
    davit=(
        "davit_tiny",
        64,
        dict(embed_dims=(16, 16, 32, 32), depths=(1, 1, 1, 1), num_heads=(2, 2, 4, 4)),
    ),
    volo=("volo_d1_224", 64, dict(img_size=64)),
    nest=("nest_tiny", 64, dict(img_size=64)),
    naflexvit=(
        "naflexvit_base_patch16_gap",
        32,
        dict(img_size=32, embed_dim=32, depth=2, num_heads=4),
    ),
)
HYBRIDS: dict[str, tuple[str, int, dict[str, Any]]] = dict(
    levit=("levit_128s", 64, dict(img_size=64)),
    coat=("coat_lite_tiny", 64, dict(img_size=64)),
    convit=("convit_tiny", 32, VIT),
    coatnet=("coatnet_nano_rw_224", 64, dict(img_size=64)),
    maxvit=("maxvit_rmlp_pico_rw_256", 64, dict(img_size=64)),
    mobilevit=("mobilevit_xxs", 64, {}),
    mobilevitv2=("mobilevitv2_050", 64, {}),
    edgenext=("edgenext_xx_small", 64, {}),
    efficientformer=("efficientformer_l1", 224, {}),
    efficientformerv2=("efficientformerv2_s0", 224, {}),
    efficientvit=("efficientvit_b0", 64, {}),
    efficientvit_msra=("efficientvit_m0", 64, dict(img_size=64)),
    fastvit=("fastvit_t8", 64, {}),
    repvit=("repvit_m0_9", 64, {}),
    tiny_vit=("tiny_vit_5m_224", 224, {}),
    visformer=("visformer_tiny", 64, dict(img_size=64)),
    botnet=("botnet26t_256", 64, dict(img_size=64)),
    lambda_resnet=("lambda_resnet26t", 64, dict(img_size=64)),
    poolformer=("poolformer_s12", 64, {}),
    caformer=("caformer_s18", 64, {}),
    nextvit=("nextvit_small", 64, {}),
    gcvit=("gcvit_xxtiny", 64, dict(img_size=64)),
    shvit=("shvit_s1", 64, {}),
)
MLPS: dict[str, tuple[str, int, dict[str, Any]]] = dict(
    mixer=("mixer_s32_224", 64, dict(img_size=64)),
    gmlp=("gmlp_ti16_224", 64, dict(img_size=64)),
    gmixer=("gmixer_12_224", 64, dict(img_size=64)),
    resmlp=("resmlp_12_224", 64, dict(img_size=64)),
    convmixer=("convmixer_768_32", 64, {}),
    sequencer=(
        "sequencer2d_s",
        56,
        dict(img_size=56, layers=(1, 1, 1, 1), embed_dims=(32, 32, 32, 32), hidden_sizes=(8, 8, 8, 8)),
    ),
)

TABLES = [("cnn", CNN), ("vit", VITS), ("hybrid", HYBRIDS), ("mlp", MLPS)]


def build(architecture: str, size: int, options: dict[str, Any]) -> nn.Module:
    """The timm model of that name with those options; `size` is the images', for `inputs`."""
    with importable():
        import timm
    torch.manual_seed(0)
    return timm.create_model(architecture, pretrained=False, num_classes=CLASSES, **options)


def image(size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(B, 3, size, size, generator=generator)}


def entries() -> list[Entry]:
    """Every timm model of the zoo, in the order of the tables."""
    return [
        Entry(f"timm_{name}", family, partial(build, *spec), partial(image, spec[1]))
        for family, table in TABLES
        for name, spec in table.items()
    ]
