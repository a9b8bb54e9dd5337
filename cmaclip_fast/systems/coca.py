"""CoCa, contrastive captioners (arXiv 2205.01917): contrastive and captioning losses on one decoder cut in two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from open_clip.transformer import AttentionalPooler, MultimodalTransformer
from pydantic import Field
from torch import Tensor, nn

from cmaclip_fast.data.tokenizer import OpenClipTokenizer, Tokenizer
from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.losses import contrastive_loss
from cmaclip_fast.nn.modes import evaluation_copy
from cmaclip_fast.systems.base import FusionConfig, TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.types import IMAGE, TEXT, Batch, Output

if TYPE_CHECKING:
    from PIL.Image import Image


class CoCaConfig(FusionConfig):
    """
    Attributes:
        queries: of the generative pooler (256 in the paper). `depth` counts the layers of the multimodal decoder.
        contrastive_weight, caption_weight: of the two losses beside the tasks' own; the paper's ratio is 1 to 2.
    """

    queries: int = Field(32, ge=1)
    contrastive_weight: float = Field(0.05, ge=0)
    caption_weight: float = Field(0.1, ge=0)


@register("coca")
class CoCa(TwoTowers):
    """An image encoder with two attentional poolers, a causal text encoder, and a decoder that looks at the image.

    Section 3.2: the text tower is the unimodal half of the decoder (causal, without sight of the image), its end token
    the text's embedding; the multimodal half cross-attends to the image. *Attentional poolers*, in cascade: the
    generative one gives the decoder its `queries` tokens, and the contrastive one, with a single query, reads those.
    Losses: `contrastive_weight * L_con + caption_weight * L_cap`. Section 4.2 classifies by the pooled image embedding
    and, for pairs, by the decoder's output at the end token: a head here reads these two and the text's embedding.

    `captions` writes a text for a picture.
    """

    title = "CoCa"
    fusion = ("decoder.",)
    Config = CoCaConfig

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config, *parts)
        if self.text_tower.global_first or getattr(getattr(self.text_tower, "text", None), "attn_mask", None) is None:
            raise InputError("coca: needs a causal text tower, whose words see no later ones: leave out --text-tower")
        width, heads = config.width, config.heads
        self.generative_pooler = AttentionalPooler(width, width, heads, config.queries)
        self.contrastive_pooler = AttentionalPooler(width, width, heads, 1)
        self.decoder = MultimodalTransformer(
            width,
            config.depth,
            heads,
            self.tokenizer.context_length + 1,
            config.mlp_ratio,
            output_dim=self.tokenizer.vocab_size,
        )
        nn.init.normal_(self.decoder.text_projection, std=width**-0.5)
        self.norm = nn.LayerNorm(3 * width)
        self.heads = self.make_heads(3 * width)

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        encoded = self.encode(batch)
        has_text, has_image = batch.present[:, TEXT, None], batch.present[:, IMAGE, None]
        image_tokens = torch.where(has_image[..., None], encoded.image[:, 1:], 0)
        seen, pooled = self.pool(image_tokens)
        decoded = self.decode(seen, encoded.text)
        rows = torch.arange(len(pooled), device=pooled.device)
        text = torch.where(has_text, encoded.globals[:, TEXT], 0)
        embedding = torch.stack([text, torch.where(has_image, pooled, 0)], dim=1)
        read = torch.where(has_text, decoded[rows, encoded.text_position], 0)
        features = self.norm(torch.cat([embedding.flatten(1), read], dim=1))
        return self.output(
            self.heads(features),
            embedding=embedding,
            towers=encoded.globals,
            kept=decoded if self.training else None,
        )

    def pool(self, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, P, D]` -> what the decoder looks at, `[B, queries, D]`, and the image's embedding, `[B, D]`."""
        seen = self.generative_pooler(image_tokens)
        return seen, self.contrastive_pooler(seen)[:, 0]

    def decode(self, seen: Tensor, text: Tensor) -> Tensor:
        """The multimodal decoder over `text [B, L, D]`, each word seeing those before it and the image: `[B, L, D]`."""
        x, size = text, text.shape[1]
        for block, cross in zip(self.decoder.resblocks, self.decoder.cross_attn, strict=True):
            x = block(x, attn_mask=self.decoder.attn_mask[:size, :size])
            x = cross(x, k_x=seen, v_x=seen)
        return self.decoder.ln_final(x)

    def words(self, decoded: Tensor) -> Tensor:
        """`[..., D]` -> logits of the next word, `[..., vocabulary]`."""
        return decoded @ self.decoder.text_projection

    def contrastive_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        encoded = self.encode(batch)
        pooled = self.pool(encoded.image[:, 1:])[1]
        return F.normalize(pooled, dim=-1), F.normalize(encoded.globals[:, TEXT], dim=-1)

    def extra_losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        complete = batch.present.all(1)
        losses = {"caption": self.config.caption_weight * self.caption_loss(batch, output.kept, complete)}
        if complete.sum() > 1:
            text, image = F.normalize(output.embedding[complete], dim=-1).unbind(1)  # type: ignore[index]
            losses["contrastive"] = self.config.contrastive_weight * contrastive_loss(image, text, self.logit_scale)
        return losses

    def caption_loss(self, batch: Batch, decoded: Tensor, complete: Tensor) -> Tensor:
        """Each word from those before it and the image (section 3.1), over the complete pairs; 0 without any."""
        size = decoded.shape[1]
        position = torch.arange(size - 1, device=decoded.device)
        asked = complete[:, None] & (position < batch.text_lengths[:, None] - 1)
        if not asked.any():
            return decoded.sum() * 0
        return F.cross_entropy(self.words(decoded[:, :-1][asked]), batch.tokens[:, 1:size][asked])

    @torch.inference_mode()
    def captions(self, pictures: Sequence[Image] | Tensor) -> list[str]:
        """Writes a text for each picture, the likeliest word at a time.

        Args:
            pictures: PIL pictures, or `[B, 3, H, W]` as in a `Batch`.
        """
        model, device = evaluation_copy(self), self.norm.weight.device
        images = pictures if isinstance(pictures, Tensor) else torch.stack([self.preprocessing(p) for p in pictures])
        seen = model.pool(model.image_projection(model.image_tower(images.to(device))[:, 1:]))[0]
        tokens = torch.full((len(images), 1), self.tokenizer.bos, device=device)
        done = torch.zeros(len(images), dtype=torch.bool, device=device)
        while tokens.shape[1] < self.tokenizer.context_length and not done.all():
            lengths = torch.full((len(tokens),), tokens.shape[1], dtype=torch.int32, device=device)
            text = model.text_projection(model.text_tower(tokens, lengths)[0])
            logits = model.words(model.decode(seen, text)[:, -1])
            logits[:, [self.tokenizer.bos, self.tokenizer.pad]] = -torch.inf
            word = torch.where(done, self.tokenizer.eot, logits.argmax(1))
            tokens = torch.cat([tokens, word[:, None]], dim=1)
            done |= word == self.tokenizer.eot
        return [spell(self.tokenizer, row) for row in tokens.tolist()]


def spell(tokenizer: Tokenizer, tokens: list[int]) -> str:
    """The text of a row of tokens, without its start and end token."""
    inner = [token for token in tokens if token not in (tokenizer.bos, tokenizer.eot)]
    if isinstance(tokenizer, OpenClipTokenizer):
        return str(tokenizer._tokenizer.decode(inner)).strip()
    engine = tokenizer._engine  # type: ignore[attr-defined]
    return "".join(engine.id_to_token(token) or "" for token in inner).replace("▁", " ").strip()
