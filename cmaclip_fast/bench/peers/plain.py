"""CMA-CLIP as a reader of the paper writes it: padded, masked, one module for each task."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmaclip_fast.bench.loops import KeylessAttention, heads_apart
from cmaclip_fast.bench.peers.system import Setting, System, twin
from cmaclip_fast.nn.dropin import accelerate
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch


class Fusion(nn.Module):
    """All after the towers: projections, `nn.TransformerEncoder` with a padding mask, and per task pooling and head."""

    def __init__(self, model: CMACLIP) -> None:
        super().__init__()
        width, config = model.config.width, model.config
        self.text_projection = twin(model.text_projection)
        self.image_projection = twin(model.image_projection)
        self.type_embedding = model.type_embedding
        layer = nn.TransformerEncoderLayer(
            width,
            config.heads,
            int(width * config.mlp_ratio),
            dropout=config.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        # nested tensors are for post-norm layers alone
        self.encoder = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)
        take_encoder_weights(self.encoder, dict(model.named_parameters()))
        self.norm = twin(model.norm)
        self.pools = nn.ModuleList(KeylessAttention(vector) for vector in model.modality_attention.weight[:, 0])
        self.heads = heads_apart(model.heads)
        self.train(model.training)

    def forward(self, image: Tensor, text: Tensor, lengths: Tensor) -> list[Tensor]:
        """`image [B, 1 + P, W]`, `text [B, L, W]`, `lengths [B]` -> for each task `[B, C_task]`."""
        rows, size = text.shape[:2]
        text = self.text_projection(text) + self.type_embedding[0]
        image = self.image_projection(image) + self.type_embedding[1]
        is_padding = torch.arange(size, device=text.device) >= lengths[:, None]
        is_padding = torch.cat([is_padding, is_padding.new_zeros(rows, image.shape[1])], dim=1)
        fused = self.encoder(torch.cat([text, image], dim=1), src_key_padding_mask=is_padding)
        ends = fused[torch.arange(rows, device=text.device), lengths.long() - 1]
        embedding = self.norm(torch.stack([ends, fused[:, -image.shape[1]]], dim=1))
        return [head(pool(embedding)) for pool, head in zip(self.pools, self.heads, strict=True)]


def take_encoder_weights(encoder: nn.TransformerEncoder, source: dict[str, nn.Parameter]) -> None:
    """Makes our sequence attention's parameters the encoder's own."""
    pairs = {
        "norm1": "norm_attention",
        "self_attn.out_proj": "out",
        "norm2": "norm_mlp",
        "linear1": "mlp.0",
        "linear2": "mlp.3",
    }
    names = {f"{theirs}.{kind}": f"{ours}.{kind}" for theirs, ours in pairs.items() for kind in ("weight", "bias")}
    names |= {f"self_attn.in_proj_{kind}": f"qkv.{kind}" for kind in ("weight", "bias")}
    for index, layer in enumerate(encoder.layers):
        for theirs, ours in names.items():
            path, _, name = theirs.rpartition(".")
            setattr(layer.get_submodule(path), name, source[f"sequence_attention.layers.{index}.{ours}"])


class PlainCMACLIP(nn.Module):
    """open_clip's towers and `Fusion`, on the weights of the model that it is made from."""

    def __init__(self, model: CMACLIP) -> None:
        super().__init__()
        self.visual: Any = twin(model.image_tower.visual)
        self.visual.output_tokens, self.visual.proj = True, None
        self.text: Any = twin(model.text_tower.text)
        self.fusion = Fusion(model)
        self.train(model.training)

    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor) -> list[Tensor]:
        """`images [B, 3, H, W]`, `tokens [B, L]`, `lengths [B]` -> for each task `[B, C_task]`."""
        first, patches = self.visual(images)
        # open_clip's own forward up to its pooling, which needs a mask of the text's length
        text, mask = self.text._embeds(tokens)
        size = tokens.shape[1]
        text = self.text.ln_final(self.text.transformer(text, attn_mask=mask[:size, :size]))
        return cast("list[Tensor]", self.fusion(torch.cat([first[:, None], patches], dim=1), text, lengths))


def to_longest(batch: Batch) -> Tensor:
    """The tokens up to the end of the longest text."""
    return batch.tokens[:, : int(batch.text_lengths.max())]


class Plain(System):
    """Every text padded to the tower's context."""

    title = "plain, padded to 77"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.module = PlainCMACLIP(setting.model)
        self._forward: Callable[..., list[Tensor]] = self.module

    def logits(self, batch: Batch) -> list[Tensor]:
        return self._forward(batch.images, batch.tokens, batch.text_lengths)


class PlainLongest(Plain):
    """Padded to the longest text of the batch."""

    title = "plain, padded to the longest"

    def logits(self, batch: Batch) -> list[Tensor]:
        return self._forward(batch.images, to_longest(batch), batch.text_lengths)


class PlainCompiled(PlainLongest):
    """The same with every transformer layer under `torch.compile`, for texts of any length.

    Layers of a kind share their code. The whole model at once takes many times as long to compile.
    """

    title = "plain, torch.compile"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        # else what was compiled for other batches counts against the limit, past which layers run eagerly
        torch.compiler.reset()
        plain = cast(PlainCMACLIP, self.module)
        for layer in plain.visual.transformer.resblocks:
            layer.compile()
        for layer in (*plain.text.transformer.resblocks, *plain.fusion.encoder.layers):
            layer.compile(dynamic=True)

    def warm(self, batch: Batch) -> None:
        start = time.perf_counter()
        if self.setting.training:
            self.loss(batch).backward()  # type: ignore[no-untyped-call]
            cast(nn.Module, self.module).zero_grad()
        else:
            self.logits(batch)
        self.prepared["compilation"] = self.prepared.get("compilation", 0.0) + time.perf_counter() - start


class Accelerated(PlainLongest):
    """The plain implementation, accelerated by one call of ours."""

    title = "plain, accelerated by cmaclip_fast"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if not setting.training:
            # ours lays its weights out beforehand, by parameter: what is shared would be laid out here too
            self.module = copy.deepcopy(self.module)
        self._forward = accelerate(cast(PlainCMACLIP, self.module))
