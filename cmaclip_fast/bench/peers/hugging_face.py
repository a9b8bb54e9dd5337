"""Hugging Face transformers' CLIP with the plain fusion."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cmaclip_fast.bench.peers.plain import Fusion, to_longest
from cmaclip_fast.bench.peers.system import Setting, System
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch


class HuggingFaceCMACLIP(nn.Module):
    """`CLIPTextModel` and `CLIPVisionModel` with copies of our towers' weights, and `Fusion`."""

    def __init__(self, model: CMACLIP) -> None:
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

        super().__init__()
        state = model.state_dict()
        image = _part(state, "image_tower.visual.")
        text = _part(state, "text_tower.text.")
        width = image["class_embedding"].shape[0]
        block: Any = model.get_submodule("image_tower.visual.transformer.resblocks.0")
        self.vision = CLIPVisionModel._from_config(
            CLIPVisionConfig(
                hidden_size=width,
                intermediate_size=len(image["transformer.resblocks.0.mlp.c_fc.weight"]),
                num_hidden_layers=_layers(image),
                num_attention_heads=block.attn.num_heads,
                image_size=model.preprocessing.size,
                patch_size=image["conv1.weight"].shape[-1],
                hidden_act="gelu",
            ),
            attn_implementation="sdpa",
        )
        block = model.get_submodule("text_tower.text.transformer.resblocks.0")
        self.text = CLIPTextModel._from_config(
            CLIPTextConfig(
                vocab_size=len(text["token_embedding.weight"]),
                hidden_size=text["positional_embedding"].shape[1],
                intermediate_size=len(text["transformer.resblocks.0.mlp.c_fc.weight"]),
                num_hidden_layers=_layers(text),
                num_attention_heads=block.attn.num_heads,
                max_position_embeddings=len(text["positional_embedding"]),
                hidden_act="gelu",
                bos_token_id=model.tokenizer.bos,
                eos_token_id=model.tokenizer.eot,
            ),
            attn_implementation="sdpa",
        )
        self.vision.load_state_dict(
            {
                "embeddings.class_embedding": image["class_embedding"],
                "embeddings.patch_embedding.weight": image["conv1.weight"],
                "embeddings.position_embedding.weight": image["positional_embedding"],
                **_renamed(image, {"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}),
                **_layer_weights(image),
            }
        )
        self.text.load_state_dict(
            {
                "embeddings.token_embedding.weight": text["token_embedding.weight"],
                "embeddings.position_embedding.weight": text["positional_embedding"],
                **_renamed(text, {"ln_final": "final_layer_norm"}),
                **_layer_weights(text),
            }
        )
        self.to(state["norm.weight"])
        self.fusion = Fusion(model)
        self.train(model.training)

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> list[Tensor]:
        """`images [B, 3, H, W]`, `tokens [B, L]`, `lengths [B]` -> for each task `[B, C_task]`."""
        image = self.vision.post_layernorm(self.vision(images).last_hidden_state)
        logits: list[Tensor] = self.fusion(image, self.text(tokens).last_hidden_state, lengths)
        return logits


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _layers(tower: dict[str, Tensor]) -> int:
    return sum(name.endswith("mlp.c_fc.weight") for name in tower)


def _renamed(tower: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {
        f"{theirs}.{kind}": tower[f"{ours}.{kind}"] for ours, theirs in names.items() for kind in ("weight", "bias")
    }


def _layer_weights(tower: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "ln_1": "layer_norm1",
        "attn.out_proj": "self_attn.out_proj",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
    found: dict[str, Tensor] = {}
    for index in range(_layers(tower)):
        ours, theirs = f"transformer.resblocks.{index}", f"encoder.layers.{index}"
        found |= _renamed(tower, {f"{ours}.{name}": f"{theirs}.{other}" for name, other in names.items()})
        for kind in ("weight", "bias"):
            parts = tower[f"{ours}.attn.in_proj_{kind}"].chunk(3)
            found |= {f"{theirs}.self_attn.{x}_proj.{kind}": part for x, part in zip("qkv", parts, strict=True)}
    return found


class HuggingFace(System):
    """Padded to the longest text of the batch; attention by PyTorch's `scaled_dot_product_attention`."""

    title = "transformers CLIP"
    packages = ("transformers",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.module = HuggingFaceCMACLIP(setting.model)

    def logits(self, batch: Batch) -> list[Tensor]:
        assert self.module is not None
        logits: list[Tensor] = self.module(batch.images, to_longest(batch), batch.text_lengths)
        return logits
