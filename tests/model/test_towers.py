"""Towers against the open_clip models they wrap: the global token, projected, is open_clip's own embedding."""

from __future__ import annotations

import pytest
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CustomTextCLIP

from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.towers import image_tower, text_tower

VIT = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 48, "heads": 3, "layers": 2}
SIGLIP_TEXT = TEXT | {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}
IMAGES = {
    "class token": VIT,
    "mean of patches": VIT | {"pool_type": "avg"},
    "norm after pool": VIT | {"pool_type": "avg", "final_ln_after_pool": True},
    "attention pool": VIT | {"attentional_pool": True, "attn_pooler_queries": 6, "attn_pooler_heads": 4},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
    "timm vit": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token", "image_size": 224},
    "timm siglip": {
        "timm_model_name": "vit_tiny_patch16_224",
        "timm_pool": "avg",
        "timm_proj": "mlp",
        "image_size": 224,
    },
    "timm convnext": {"timm_model_name": "convnext_atto", "timm_pool": "", "timm_proj": "linear", "image_size": 64},
}
TEXTS = {
    "end of text": TEXT,
    "end id": TEXT | {"pool_type": "eos", "eos_id": 49},
    "last position": SIGLIP_TEXT,
    "bias": TEXT | {"proj_bias": True},
}
END = 49


def make(vision: dict, text: dict) -> CustomTextCLIP:
    torch.manual_seed(0)
    return CustomTextCLIP(embed_dim=40, vision_cfg=vision, text_cfg=text).eval()


def make_tokens(lengths: list[int], context: int) -> torch.Tensor:
    tokens = torch.zeros(len(lengths), context, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = torch.randint(1, END - 1, (length - 1,))
        tokens[row, length - 1] = END
    return tokens


@pytest.mark.parametrize("family", IMAGES)
@torch.inference_mode()
def test_projected_global_image_token_is_open_clips_embedding(family: str) -> None:
    clip = make(IMAGES[family], TEXT)
    tower = image_tower(clip.visual).eval()
    images = torch.randn(3, 3, *clip.visual.image_size) if family.startswith("timm") else None
    if images is None:
        size = IMAGES[family]["image_size"]
        images = torch.randn(3, 3, size, size)
    tokens = tower(images)
    assert tokens.shape[0] == 3 and tokens.shape[2] == tower.width and tokens.shape[1] > 1
    torch.testing.assert_close(tower.project(tokens[:, 0]), clip.encode_image(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", [name for name in IMAGES if name != "attention pool"])
@torch.inference_mode()
def test_grid_counts_the_patches(family: str) -> None:
    tower = image_tower(make(IMAGES[family], TEXT).visual).eval()
    size = IMAGES[family]["image_size"]
    tokens = tower(torch.randn(1, 3, size, size))
    assert tower.grid is not None and tokens.shape[1] == 1 + tower.grid[0] * tower.grid[1]


@pytest.mark.parametrize("family", TEXTS)
@torch.inference_mode()
def test_projected_global_text_token_is_open_clips_embedding(family: str) -> None:
    clip = make(VIT, TEXTS[family])
    tower = text_tower(clip.text).eval()
    lengths = [12, 2, 7]
    tokens = make_tokens(lengths, 12)
    features, counts = tower(tokens, torch.tensor(lengths, dtype=torch.int32))
    ends = features[torch.arange(3), counts.long() - 1]
    torch.testing.assert_close(tower.project(ends), clip.encode_text(tokens), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_coca_class_token_stands_behind_the_text() -> None:
    torch.manual_seed(0)
    coca = CoCa(
        embed_dim=40,
        multimodal_cfg={"context_length": 12, "vocab_size": 50, "width": 48, "heads": 3, "layers": 1},
        text_cfg=TEXT | {"embed_cls": True, "output_tokens": True},
        vision_cfg=IMAGES["attention pool"] | {"output_tokens": True},
    ).eval()
    lengths = [12, 2, 7]
    tokens = make_tokens(lengths, 12)
    tower = text_tower(coca.text)
    features, counts = tower(tokens, torch.tensor(lengths, dtype=torch.int32))
    assert counts.tolist() == [13, 3, 8]
    ends = features[torch.arange(3), counts.long() - 1]
    torch.testing.assert_close(tower.project(ends), coca.encode_text(tokens, normalize=False), atol=1e-5, rtol=1e-4)
    images = torch.randn(2, 3, 32, 32)
    image = image_tower(coca.visual)
    projected = image.project(image(images)[:, 0])
    torch.testing.assert_close(projected, coca.encode_image(images, normalize=False), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_causal_tower_stops_at_the_longest_text() -> None:
    tower = text_tower(make(VIT, TEXT).text)
    features, counts = tower(make_tokens([3, 5], 12), torch.tensor([3, 5], dtype=torch.int32))
    assert features.shape[1] == 5 and counts.tolist() == [3, 5]


def test_unknown_towers_are_refused_by_name() -> None:
    with pytest.raises(InputError, match="Linear is not supported"):
        image_tower(torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match="Linear is not supported"):
        text_tower(torch.nn.Linear(1, 1))
