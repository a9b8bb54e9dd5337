"""CMA-CLIP as the paper's reader writes it: stock towers on padded texts, `nn.TransformerEncoder` with a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmaclip_fast.nn.heads import TaskHeads
from cmaclip_fast.nn.towers import ClipTextTower, ViTImageTower
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch


def padded_logits(model: CMACLIP, batch: Batch) -> dict[str, Tensor]:
    """The logits of `model`, computed without any of its packing; dropout must be off."""
    image = image_tokens(model.image_tower, batch.images)
    text, counts = text_tokens(model.text_tower, batch.tokens, batch.text_lengths)
    image, text = model.image_projection(image), model.text_projection(text)
    rows = torch.arange(len(batch))
    first = model.text_tower.global_first
    position = torch.zeros_like(counts) if first else counts - 1
    if model.config.sequence_attention:
        length = text.shape[1]
        text, image = text + model.type_embedding[0], image + model.type_embedding[1]
        of_text = (torch.arange(length) >= counts[:, None]) | ~batch.present[:, :1]
        of_image = (~batch.present[:, 1:]).expand(-1, image.shape[1])
        fused = encoder(model)(torch.cat([text, image], 1), src_key_padding_mask=torch.cat([of_text, of_image], 1))
        embedding = torch.stack([fused[rows, position.long()], fused[:, length]], 1)
    else:
        embedding = torch.stack([text[rows, position.long()], image[:, 0]], 1)
    embedding = model.norm(embedding).masked_fill(~batch.present[..., None], 0)
    logits = {}
    for k, task in enumerate(model.tasks):
        if model.config.modality_attention:
            scores = (embedding * model.modality_attention.weight[k]).sum(-1).masked_fill(~batch.present, -torch.inf)
            logits[task] = head(model.heads, k, (scores.softmax(-1)[..., None] * embedding).sum(1))
        else:
            logits[task] = head(model.heads, k, embedding.flatten(1))
    return logits


def head(heads: TaskHeads, task: int, x: Tensor) -> Tensor:
    hidden, classes = heads.hidden.rows[task], heads.classes.rows[task]
    x = F.gelu(F.linear(x, heads.hidden.weight[hidden], heads.hidden.bias[hidden]))
    return F.linear(x, heads.classes.weight[classes], heads.classes.bias[classes])


def image_tokens(tower: nn.Module, images: Tensor) -> Tensor:
    if not isinstance(tower, ViTImageTower):
        return tower(images)
    visual = tower.visual
    pooled, tokens = visual._pool(visual.transformer(visual._embeds(images)))
    if visual.final_ln_after_pool and visual.attn_pool is None:
        tokens = visual.ln_post(tokens)
    return torch.cat([pooled[:, None], tokens], 1)


def text_tokens(tower: nn.Module, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(tower, ClipTextTower) or tower.text.cls_emb is not None:
        return tower(tokens, lengths)
    x, mask = tower.text._embeds(tokens)
    x = tower.text.ln_final(tower.text.transformer(x, attn_mask=mask))
    return x, torch.full_like(lengths, x.shape[1]) if tower.text.pool_type == "last" else lengths


def encoder(model: CMACLIP) -> nn.TransformerEncoder:
    config = model.config
    layer = nn.TransformerEncoderLayer(
        config.width,
        config.heads,
        int(config.width * config.mlp_ratio),
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    stack = nn.TransformerEncoder(layer, config.depth, enable_nested_tensor=False)
    for theirs, ours in zip(stack.layers, model.sequence_attention.layers, strict=True):
        theirs.self_attn.in_proj_weight, theirs.self_attn.in_proj_bias = ours.qkv.weight, ours.qkv.bias
        theirs.self_attn.out_proj = ours.out
        theirs.norm1, theirs.norm2 = ours.norm_attention, ours.norm_mlp
        theirs.linear1, theirs.linear2 = ours.mlp[0], ours.mlp[3]
    return stack.train(model.training)
