"""Small copies of open_clip's registered models: the same kinds of towers and options, fewer and narrower layers."""

from __future__ import annotations

import copy

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CLIP, CustomTextCLIP

VOCABULARY, CONTEXT = 60, 12
END = VOCABULARY - 1
SMALL_VIT = {"image_size": 24, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}


def text_kind(name: str) -> str | None:
    """What tells the text tower of a registered model from others, or None for a Hugging Face tower."""
    text = open_clip.get_model_config(name)["text_cfg"]
    if "hf_model_name" in text:
        return None
    sizes = ("width", "heads", "layers", "vocab_size", "context_length", "hf_tokenizer_name", "tokenizer_kwargs")
    return str(sorted((key, value) for key, value in text.items() if key not in sizes))


def image_kind(name: str) -> str | None:
    """The same of the image tower, or None for one of timm or a ResNet."""
    vision = open_clip.get_model_config(name)["vision_cfg"]
    if "timm_model_name" in vision or isinstance(vision["layers"], list):
        return None
    sizes = ("width", "layers", "image_size", "patch_size")
    quick = open_clip.get_model_config(name).get("quick_gelu", False)
    return str(sorted((key, value) for key, value in vision.items() if key not in sizes)) + f" quick_gelu={quick}"


def small(name: str, image_size: int = 24) -> CustomTextCLIP | CoCa:
    """A registered model of small size; a timm or ResNet image tower is replaced by a small ViT."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if image_kind(name) is None:
        vision = SMALL_VIT | {"image_size": image_size}
    else:
        head = 16
        vision |= {"width": 2 * head, "layers": 2, "image_size": image_size, "patch_size": 8, "head_width": head}
        vision |= {"attn_pooler_heads": 2} if "attn_pooler_heads" in vision else {}
    text |= {"width": 48, "heads": 3, "layers": 2, "vocab_size": VOCABULARY, "context_length": CONTEXT}
    torch.manual_seed(0)
    extra = {"quick_gelu": config.get("quick_gelu", False)}
    if "multimodal_cfg" in config:
        multimodal = config["multimodal_cfg"] | {"width": 48, "heads": 3, "layers": 1, "context_length": CONTEXT}
        return CoCa(40, multimodal | {"vocab_size": VOCABULARY}, text, vision, **extra)
    return CustomTextCLIP(40, vision, text, **extra)


def classic(name: str) -> CLIP:
    """The same as open_clip's `CLIP`, whose text tower has no module of its own; always a small plain ViT."""
    text = copy.deepcopy(open_clip.get_model_config(name)["text_cfg"])
    text |= {"width": 48, "heads": 3, "layers": 2, "vocab_size": VOCABULARY, "context_length": CONTEXT}
    torch.manual_seed(0)
    return CLIP(40, SMALL_VIT, text)


def make_tokens(lengths: list[int], end: int = END) -> torch.Tensor:
    """`[B, CONTEXT]`, each text ending with the end-of-text token, padded with 0."""
    generator = torch.Generator().manual_seed(sum(lengths))
    tokens = torch.zeros(len(lengths), CONTEXT, dtype=torch.int64)
    for row, length in enumerate(lengths):
        tokens[row, : length - 1] = torch.randint(3, END, (length - 1,), generator=generator)
        tokens[row, length - 1] = end
    return tokens
