"""One-stream transformers over words and image tokens: ImageBERT, FashionBERT and OSCAR."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.towers import HuggingFaceTextTower
from cmaclip_fast.systems.base import Encoded, FusionConfig, TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.systems.stream import Fused, OneStream, mask_token, mask_words
from cmaclip_fast.types import IMAGE, TEXT, Batch, Output


class OneStreamConfig(FusionConfig):
    """
    Attributes:
        variant: whose losses are taken: `imagebert`, `fashionbert` or `oscar`.
        pretext_weight: of each of them beside the tasks' own; 0 leaves them out.
        mask: how often a word, a patch or a tag is hidden for them.
    """

    variant: Literal["imagebert", "fashionbert", "oscar"] = "imagebert"
    pretext_weight: float = Field(0.1, ge=0)
    mask: float = Field(0.15, gt=0, lt=1)


class Pretext(nn.Module):
    """Masked words and matching pairs, which every one-stream transformer is trained with."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.words = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width), nn.Linear(width, vocabulary)
        )
        self.match = nn.Linear(width, 2)

    def word_loss(self, fused: Fused, tokens: Tensor, chosen: Tensor) -> Tensor:
        """The cross-entropy of the hidden words (arXiv 1810.04805, section 3.1); 0 where none is hidden."""
        rows, positions = chosen.nonzero(as_tuple=True)
        if not len(rows):
            return fused.tokens.sum() * 0
        return F.cross_entropy(self.words(fused.text(rows, positions)), tokens[rows, positions])

    def match_loss(self, fused: Fused, matches: Tensor, counted: Tensor) -> Tensor:
        """Whether text and image belong together: `matches [B]` bool, over the rows `counted [B]`."""
        if not counted.any():
            return fused.tokens.sum() * 0
        return F.cross_entropy(self.match(fused.class_tokens()[counted]), matches[counted].long())


def mismatched(complete: Tensor) -> Tensor:
    """`[B]`, for each row itself or, for half of the complete pairs, the next complete row."""
    rows = torch.arange(len(complete), device=complete.device)
    whole = rows[complete]
    swap = torch.rand(len(whole), device=rows.device) < 0.5
    return rows.clone().index_put_((whole,), torch.where(swap, whole.roll(1), whole))


@register("one-stream")
class OneStreamBERT(TwoTowers):
    """Words and image tokens through one transformer; the class token is classified.

    *ImageBERT* (arXiv 2001.07966): section 4.2, masked language modelling, masked region feature regression (their
    regions are our patches) and image-text matching; masks are counted in matching pairs only. Masked object
    classification needs a detector's labels, and is left out.

    *FashionBERT* (arXiv 2005.09801): patches for regions; section 3.3, masked language modelling, masked patch
    modelling (the divergence between the softmax over a patch's true and predicted features) and text-image alignment.
    Its adaptive weights of the three losses are left out.

    *OSCAR* (arXiv 2004.06165): section 3, input of words, object tags and image; the masked-token loss over words and
    tags, and the contrastive loss, which tells the tags from another picture's. A detector gives their tags; here
    they are the names of the classes that the image tower alone, by its auxiliary head, finds for each task, each read
    by the text tower into one token.

    The tokens are the shared towers', so words are masked before the text tower, which reads the text once more.
    """

    title = "one-stream"
    fusion = ("stream.",)
    Config = OneStreamConfig

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config, *parts)
        if config.variant == "oscar" and not config.auxiliary_heads:
            raise InputError("one-stream: variant oscar takes its tags from auxiliary_heads: set that option to true")
        self.stream = OneStream(config.width, config.depth, config.heads, config.mlp_ratio, config.dropout)
        self.heads = self.make_heads(config.width)
        self.mask_token = mask_token(self.tokenizer)
        if config.pretext_weight:
            self.pretext = Pretext(config.width, self.tokenizer.vocab_size)
            if config.variant == "oscar":
                self.hidden_tag = nn.Parameter(torch.zeros(config.width))
            else:
                self.patch_features = nn.Linear(config.width, self.image_tower.width)
                self.hidden_patch = nn.Parameter(torch.zeros(config.width))

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        encoded, patches = self._encode(batch)
        tags, tag_rows = self._tags(encoded.globals[:, IMAGE]) if self.config.variant == "oscar" else (None, None)
        image = encoded.image if tags is None else torch.cat([encoded.image, tags], dim=1)
        fused = self.stream(encoded.text, encoded.text_lengths, image, batch.present, with_attention)
        return self.output(
            self.heads(fused.class_tokens()),
            towers=encoded.globals,
            attention=fused.maps() if tags is None else None,  # with tags, the image's tokens are not patches alone
            kept=(encoded, patches, tags, tag_rows) if self.training else None,
        )

    def _encode(self, batch: Batch) -> tuple[Encoded, Tensor]:
        """As `encode`, and the image tower's own patches `[B, P, W]`."""
        tokens = self.image_tower(batch.images)
        text, lengths = self._read(batch.tokens, batch.text_lengths)
        image, position = self.image_projection(tokens), self.text_position(lengths)
        rows = torch.arange(len(text), device=text.device)
        towers = torch.stack([text[rows, position], image[:, 0]], dim=1)
        return Encoded(text, lengths, image, towers, position), tokens[:, 1:]

    def _read(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        words, counts = self.text_tower(tokens, lengths)
        return self.text_projection(words), counts

    def _tags(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The tags that each image's global token `[B, D]` leads to: `[B, K, D]`, and their classes `[B, K]`."""
        found = self.by_task(self.auxiliary_heads[IMAGE](image.detach()))
        classes = torch.stack([logits.argmax(1) for logits in found.values()], dim=1)
        pairs = [(k, c) for k, column in enumerate(classes.T.tolist()) for c in column]
        different = sorted(set(pairs))
        read = self._read_names(different)
        index = torch.tensor([different.index(pair) for pair in pairs], device=image.device)
        return read[index].view(len(self.tasks), len(image), -1).transpose(0, 1), classes

    def _read_names(self, classes: list[tuple[int, int]]) -> Tensor:
        """The text tower's global tokens for the names of (task, class) pairs: `[N, D]`."""
        names = list(self.tasks.values())
        tokens, lengths, _ = self.tokenizer.encode([names[k][c].replace("_", " ") for k, c in classes])
        device = self.stream.class_token.device
        text, counts = self._read(tokens.to(device), lengths.to(device))
        return text[torch.arange(len(text), device=device), self.text_position(counts)]

    def extra_losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.config.pretext_weight:
            return {}
        encoded, patches, tags, classes = output.kept
        complete = batch.present.all(1)
        losses = (
            self._oscar_losses(batch, encoded, tags, classes, complete)
            if self.config.variant == "oscar"
            else self._patch_losses(batch, encoded, patches, complete)
        )
        return {name: self.config.pretext_weight * loss for name, loss in losses.items()}

    def _hidden_words(self, batch: Batch, rows: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The texts of `rows` with words hidden in the rows `where`: text tokens and counts; words, and the hidden."""
        tokens, lengths = batch.tokens[rows], batch.text_lengths[rows]
        share = self.config.mask * where[:, None]
        corrupted, chosen = mask_words(tokens, lengths, share, self.mask_token, self.tokenizer.vocab_size)
        text, counts = self._read(corrupted, lengths)
        if isinstance(self.text_tower, HuggingFaceTextTower):
            # it puts its global token before the words
            chosen, tokens = F.pad(chosen, (1, 0)), F.pad(tokens, (1, 0))
        return text, counts, tokens, chosen, lengths

    def _patch_losses(self, batch: Batch, encoded: Encoded, patches: Tensor, complete: Tensor) -> dict[str, Tensor]:
        rows = mismatched(complete)
        matches = rows == torch.arange(len(rows), device=rows.device)
        text, counts, tokens, chosen, _ = self._hidden_words(batch, rows, matches & batch.present[:, TEXT])
        there = (matches & batch.present[:, IMAGE])[:, None]
        hidden = there & (torch.rand(patches.shape[:2], device=patches.device) < self.config.mask)
        image = torch.where(F.pad(hidden, (1, 0))[..., None], self.hidden_patch, encoded.image)
        fused = self.stream(text, counts, image, batch.present)
        losses = {
            "masked words": self.pretext.word_loss(fused, tokens, chosen),
            # two complete pairs are needed to mismatch any
            "matching": self.pretext.match_loss(fused, matches, complete & (complete.sum() > 1)),
        }
        at, places = hidden.nonzero(as_tuple=True)
        if len(at):
            said = self.patch_features(fused.image(at, places + 1))
            true = F.layer_norm(patches[at, places].detach(), patches.shape[-1:])
            if self.config.variant == "imagebert":
                losses["masked patches"] = F.mse_loss(said, true)
            else:
                losses["masked patches"] = F.kl_div(
                    said.log_softmax(1), true.softmax(1), reduction="batchmean", log_target=False
                )
        return losses

    def _oscar_losses(
        self, batch: Batch, encoded: Encoded, tags: Tensor, classes: Tensor, complete: Tensor
    ) -> dict[str, Tensor]:
        has_image = batch.present[:, IMAGE]
        rows = mismatched(has_image)
        matches = rows == torch.arange(len(rows), device=rows.device)
        own = torch.arange(len(rows), device=rows.device)
        text, counts, tokens, chosen, _ = self._hidden_words(batch, own, matches & batch.present[:, TEXT])
        hidden = (matches & has_image)[:, None] & (torch.rand(classes.shape, device=rows.device) < self.config.mask)
        shown = torch.where(hidden[..., None], self.hidden_tag, tags[rows])
        fused = self.stream(text, counts, torch.cat([encoded.image, shown], dim=1), batch.present)
        losses = {
            "masked words": self.pretext.word_loss(fused, tokens, chosen),
            "tags or polluted tags": self.pretext.match_loss(fused, matches, has_image & (has_image.sum() > 1)),
        }
        at, places = hidden.nonzero(as_tuple=True)
        if len(at):
            # a hidden tag is told among the names of its task's classes
            said = fused.image(at, places + encoded.image.shape[1])
            parts = []
            for k, names in enumerate(self.tasks.values()):
                mine = places == k
                if mine.any():
                    embeddings = self._read_names([(k, c) for c in range(len(names))])
                    scores = said[mine] @ embeddings.T * embeddings.shape[1] ** -0.5
                    parts.append(F.cross_entropy(scores, classes[at[mine], k], reduction="sum"))
            losses["masked tags"] = torch.stack(parts).sum() / len(at)
        return losses
