"""KaleidoBERT (arXiv 2103.16110): patches at several scales, hidden together with the words they align with."""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from cmaclip_fast.nn.towers import HuggingFaceTextTower
from cmaclip_fast.systems.base import FusionConfig, TwoTowers
from cmaclip_fast.systems.one_stream import Pretext, mismatched
from cmaclip_fast.systems.registry import register
from cmaclip_fast.systems.stream import Fused, OneStream, mask_token, mask_words, pool_patches
from cmaclip_fast.types import IMAGE, TEXT, Batch, Output

JIGSAW = tuple(itertools.permutations(range(4)))
"""The 24 orders of the patches of the 2 x 2 scale (section 3.4, jigsaw puzzle solving)."""


class KaleidoConfig(FusionConfig):
    """
    Attributes:
        scales: patches a side of each scale; the paper's are 1 to 5, which makes 55 patches.
        pretext_weight: of each pretext loss beside the tasks' own; 0 leaves them out.
        mask: how often a word, or the patch it aligns with, is hidden for them.
    """

    scales: tuple[int, ...] = (1, 2, 3, 4, 5)
    pretext_weight: float = Field(0.1, ge=0)
    mask: float = Field(0.15, gt=0, lt=1)


@register("kaleidobert")
class KaleidoBERT(TwoTowers):
    """Words and kaleido patches through one transformer; the class token is classified.

    Section 3.2, *kaleido patch generator*: the picture is cut into 1 x 1, 2 x 2, ... 5 x 5 patches, here by averaging
    the shared image tower's own; each has an embedding of its scale and place. Section 3.3, *alignment*: a word aligns
    with the patch of the finer scales that it attends to most; the paper takes a captioner's attention, this takes the
    last layer's of the fusing transformer itself. *Alignment-guided masking*: of an aligned pair the word or the patch
    is hidden, never both. Section 3.4, losses: masked words, matching pairs, and of the patches' own the jigsaw of the
    2 x 2 scale, the camouflaged patch of the 3 x 3 scale (another picture's) and the hidden patches of the 4 x 4 and
    5 x 5 scales told from the rest. Rotation and grey-to-colour change pixels, which would run the image tower again,
    and are left out.
    """

    title = "KaleidoBERT"
    fusion = ("stream.",)
    Config = KaleidoConfig

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config, *parts)
        self.patches = sum(scale**2 for scale in config.scales)
        self.place_embedding = nn.Parameter(torch.empty(self.patches, config.width))
        nn.init.normal_(self.place_embedding, std=0.02)
        self.stream = OneStream(config.width, config.depth, config.heads, config.mlp_ratio, config.dropout)
        self.heads = self.make_heads(config.width)
        self.mask_token = mask_token(self.tokenizer)
        if config.pretext_weight:
            self.pretext = Pretext(config.width, self.tokenizer.vocab_size)
            self.jigsaw = nn.Linear(4 * config.width, len(JIGSAW))
            self.camouflage = nn.Linear(config.width, 1)
            self.patch_features = nn.Linear(config.width, self.image_tower.width)
            self.hidden_patch = nn.Parameter(torch.zeros(self.image_tower.width))

    def kaleido(self, patches: Tensor) -> Tensor:
        """`[B, P, W]` -> `[B, 55, W]`: the patches of each scale in turn, row by row."""
        grid = self.image_tower.grid
        return torch.cat([pool_patches(patches, grid, scale) for scale in self.config.scales], dim=1)

    def places(self, scale: int) -> slice:
        """Where the patches of a scale are among all; empty if there is no such scale."""
        scales = self.config.scales
        if scale not in scales:
            return slice(0, 0)
        start = sum(before**2 for before in scales[: scales.index(scale)])
        return slice(start, start + scale**2)

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        tokens = self.image_tower(batch.images)
        text_tokens, lengths = self.text_tower(batch.tokens, batch.text_lengths)
        text, rows = self.text_projection(text_tokens), torch.arange(len(tokens), device=tokens.device)
        towers = torch.stack([text[rows, self.text_position(lengths)], self.image_projection(tokens[:, 0])], dim=1)
        patches = self.kaleido(tokens[:, 1:])
        aligns = self.training and self.config.pretext_weight > 0
        fused = self.stream(text, lengths, self._embed(patches), batch.present, with_weights=aligns)
        kept = (patches, self.alignment(fused, batch.tokens.shape[1])) if aligns else None
        return self.output(self.heads(fused.class_tokens()), towers=towers, kept=kept)

    def _embed(self, patches: Tensor) -> Tensor:
        return self.image_projection(patches) + self.place_embedding

    @torch.no_grad()
    def alignment(self, fused: Fused, length: int) -> Tensor:
        """The patch that each token of the text attends to most, `[B, length]`; -1 where there is no such pair.

        Only patches of the two finest scales count: the coarser ones cover the picture.
        """
        fine = sum(scale**2 for scale in self.config.scales[:-2])
        aligned = torch.full((len(fused.starts), length), -1, device=fused.tokens.device)
        offset = int(self._adds_a_token)
        for row, (weights, count) in enumerate(zip(fused.weights or [], fused.text_tokens.tolist(), strict=True)):
            to_patches = weights[1 + offset : 1 + count, 1 + count + fine :]
            if to_patches.numel():
                best = to_patches.argmax(1)[:length] + fine
                aligned[row, : len(best)] = best
        return aligned

    @property
    def _adds_a_token(self) -> bool:
        """Whether the text tower puts its global token before the words."""
        return isinstance(self.text_tower, HuggingFaceTextTower)

    def guided_masks(self, aligned: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Alignment-guided masking (section 3.3): words and patches to hide, `[B, L]` and `[B, 55]` bool.

        Of the words that may be hidden, `words [B, L]`, some are chosen. One that aligns with a patch is hidden, or the
        patch is, by a coin; a patch is never hidden along with a word that aligns with it.
        """
        chosen = words & (torch.rand(words.shape, device=words.device) < 2 * self.config.mask)
        coin = torch.rand(words.shape, device=words.device) < 0.5
        hide_words = chosen & (coin | (aligned < 0))
        hide_patches = self._patches_of(aligned, chosen & ~hide_words)
        hide_patches &= ~self._patches_of(aligned, hide_words)
        return hide_words, hide_patches

    def _patches_of(self, aligned: Tensor, words: Tensor) -> Tensor:
        rows, positions = (words & (aligned >= 0)).nonzero(as_tuple=True)
        hidden = torch.zeros(len(aligned), self.patches, dtype=torch.bool, device=aligned.device)
        hidden[rows, aligned[rows, positions]] = True
        return hidden

    def extra_losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        if not self.config.pretext_weight:
            return {}
        patches, aligned = output.kept
        complete, has_image = batch.present.all(1), batch.present[:, IMAGE]
        rows = mismatched(complete)
        matches = rows == torch.arange(len(rows), device=rows.device)

        position = torch.arange(batch.tokens.shape[1], device=rows.device)
        inner = (position > 0) & (position < batch.text_lengths[:, None] - 1)
        maskable = inner & (matches & batch.present[:, TEXT])[:, None]
        hide_words, hide_patches = self.guided_masks(aligned, maskable)
        tokens, lengths = batch.tokens[rows], batch.text_lengths[rows]
        corrupted, chosen = mask_words(tokens, lengths, hide_words.float(), self.mask_token, self.tokenizer.vocab_size)
        text_tokens, counts = self.text_tower(corrupted, lengths)
        if self._adds_a_token:
            chosen, tokens = F.pad(chosen, (1, 0)), F.pad(tokens, (1, 0))

        pieces = torch.where(hide_patches[..., None], self.hidden_patch, patches)
        pieces, order = self._shuffle(pieces, has_image & matches)
        pieces, odd = self._camouflage(pieces, patches, has_image & matches)
        fused = self.stream(self.text_projection(text_tokens), counts, self._embed(pieces), batch.present)

        losses = {
            "masked words": self.pretext.word_loss(fused, tokens, chosen),
            "matching": self.pretext.match_loss(fused, matches, complete & (complete.sum() > 1)),
        }
        losses |= self._patch_losses(fused, patches, hide_patches, order, odd)
        return {name: self.config.pretext_weight * loss for name, loss in losses.items()}

    def _shuffle(self, pieces: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Puts the 2 x 2 patches of the rows `where` in another order; which of the 24, `[B]`, -1 elsewhere."""
        place = self.places(2)
        if place.stop == 0:
            return pieces, torch.full((len(pieces),), -1, device=pieces.device)
        order = torch.randint(len(JIGSAW), (len(pieces),), device=pieces.device)
        order = torch.where(where, order, -1)
        moves = torch.tensor(JIGSAW, device=pieces.device)[order.clamp(min=0)]
        moved = pieces[:, place].gather(1, moves[..., None].expand(-1, -1, pieces.shape[2]))
        return torch.cat([pieces[:, : place.start], moved, pieces[:, place.stop :]], dim=1), order

    def _camouflage(self, pieces: Tensor, patches: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Puts one of another picture's 3 x 3 patches in the place of its own; which, `[B]`, -1 elsewhere."""
        place = self.places(3)
        others = where.nonzero().flatten()
        odd = torch.full((len(pieces),), -1, device=pieces.device)
        if place.stop == 0 or len(others) < 2:
            return pieces, odd
        odd[others] = torch.randint(9, (len(others),), device=pieces.device)
        pieces = pieces.clone()
        pieces[others, place.start + odd[others]] = patches[others.roll(1), place.start + odd[others]]
        return pieces, odd

    def _patch_losses(
        self, fused: Fused, patches: Tensor, hidden: Tensor, order: Tensor, odd: Tensor
    ) -> dict[str, Tensor]:
        losses = {}
        shuffled = (order >= 0).nonzero().flatten()
        if len(shuffled):
            read = self._read(fused, shuffled, self.places(2))
            losses["jigsaw"] = F.cross_entropy(self.jigsaw(read.flatten(1)), order[shuffled])
        changed = (odd >= 0).nonzero().flatten()
        if len(changed):
            read = self._read(fused, changed, self.places(3))
            losses["camouflage"] = F.cross_entropy(self.camouflage(read).squeeze(-1), odd[changed])
        rows, places = hidden.nonzero(as_tuple=True)
        if len(rows):
            true = F.layer_norm(patches[rows, places].detach(), patches.shape[-1:])
            losses["masked patches"] = F.smooth_l1_loss(self.patch_features(fused.image(rows, places)), true)
        return losses

    def _read(self, fused: Fused, rows: Tensor, places: slice) -> Tensor:
        """The fused patches at `places` of some rows: `[N, places, D]`."""
        index = torch.arange(places.start, places.stop, device=rows.device)
        every = rows[:, None].expand(-1, len(index))
        return fused.image(every.flatten(), index.repeat(len(rows))).view(len(rows), len(index), -1)
