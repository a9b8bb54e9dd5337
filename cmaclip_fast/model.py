"""CMA-CLIP: towers -> sequence attention -> modality attention -> one head per task (arXiv 2112.03562, figure 1)."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.model import CustomTextCLIP
from open_clip.utils import to_2tuple
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from cmaclip_fast.data.preprocess import MAX_IMAGE_SIZE, ImagePreprocessing
from cmaclip_fast.data.tokenizer import MAX_CONTEXT, OpenClipTokenizer, Tokenizer
from cmaclip_fast.distinct import distinct_images, distinct_texts
from cmaclip_fast.errors import InputError
from cmaclip_fast.layers import Queries, Rows, run_linear
from cmaclip_fast.modules import ModalityAttention, Projection, SequenceAttention
from cmaclip_fast.ops import pack_tokens
from cmaclip_fast.pretrained import (
    HuggingFaceText,
    OpenClipModel,
    TimmImage,
    note_open_clip,
    rebuild_open_clip,
    with_other_towers,
)
from cmaclip_fast.systems import system_config
from cmaclip_fast.systems.base import System
from cmaclip_fast.tiny import TinyCLIP
from cmaclip_fast.towers import image_tower, text_tower
from cmaclip_fast.types import IMAGE, TEXT, AttentionMaps, Batch, Output


class ModelConfig(BaseModel):
    """What is needed to build a `CMACLIP` again.

    Attributes:
        name: `tiny`, or an open_clip model name.
        image_size: pixels a side; None keeps the named model's.
        context_length: most tokens of a text; None keeps the named model's.
        text_tower: a folder with a Hugging Face encoder that takes the place of the named model's text tower; once
            built, what such a tower is built from again without that folder.
        image_tower: a timm model's name, with weights if wanted, that takes the place of the image tower.
        clip: once built, what the named open_clip model is built from again without its name; None for `tiny`.
        width: D, the common width of the fused sequence.
        depth: layers of sequence-wise attention.
        heads: attention heads of each layer; divides `width`.
        mlp_ratio: hidden width of each layer's MLP, in widths.
        dropout: after each layer's attention and inside and after its MLP.
        head_hidden: hidden width of each task's MLP; None is `width`.
        head_dropout: inside each task's MLP.
        sequence_attention: False is the ablation: the towers' global tokens, projected, are the embeddings.
        modality_attention: False is the ablation: each head gets both embeddings, side by side.
        vectors: keyless attention with one vector per task (the paper), or one per task and modality.
        auxiliary_heads: each tower also classifies alone, in training, which keeps the modality that is learnt first
            from starving the other; not used for predictions.
    """

    model_config = ConfigDict(extra="forbid")

    name: str = "ViT-B-32"
    image_size: int | None = Field(None, gt=0, le=MAX_IMAGE_SIZE)
    context_length: int | None = Field(None, gt=2, le=MAX_CONTEXT)
    text_tower: str | HuggingFaceText | None = None
    image_tower: str | TimmImage | None = None
    clip: OpenClipModel | None = None
    width: int = Field(512, gt=0)
    depth: int = Field(4, ge=1)
    heads: int = Field(8, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    head_hidden: int | None = Field(None, gt=0)
    head_dropout: float = Field(0.0, ge=0, lt=1)
    sequence_attention: bool = True
    modality_attention: bool = True
    vectors: Literal["task", "task-and-modality"] = "task"
    auxiliary_heads: bool = False

    @model_validator(mode="after")
    def _fits_together(self) -> ModelConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


TINY = ModelConfig(
    name="tiny",
    image_size=96,
    context_length=32,
    width=128,
    depth=1,
    heads=4,
    dropout=0.1,
    head_dropout=0.3,
    auxiliary_heads=True,
)
"""Our small CLIP, for training from scratch on a CPU."""


@dataclass
class _Tokens:
    """Tokens `values [T, D]` of a modality; row b of the batch has those from `starts[b]`, `counts[b]` of them."""

    values: Tensor
    starts: Tensor
    counts: Tensor
    longest: int

    def global_tokens(self, first: bool) -> Tensor:
        """`[B, D]`, the first or last token of each row; some other token where a row has none."""
        if len(self.values) == 0:
            return self.values.new_zeros(len(self.starts), self.values.shape[1])
        index = self.starts if first else self.starts + self.counts - 1
        return self.values.index_select(0, index.clamp(0, len(self.values) - 1))


class CMACLIP(System):
    """The whole system: a `Batch` in, an `Output` out.

    Attributes:
        config: how it was built.
        tasks: for each task the names of its classes, in the order of its logits.
        preprocessing: how a picture becomes `images`.
        tokenizer: how a text becomes `tokens` and `text_lengths`.
    """

    Config = ModelConfig
    system = "cma-clip"
    title = "CMA-CLIP"
    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        tasks: Mapping[str, Sequence[str]],
        clip: CustomTextCLIP | CoCa | TinyCLIP,
        preprocessing: ImagePreprocessing,
        tokenizer: Tokenizer,
    ) -> None:
        """Use `create_model`, which finds `clip`, `preprocessing` and `tokenizer` for a name.

        Args:
            clip: an open_clip model with `visual`, `text` and `logit_scale`.

        Raises:
            InputError: no task, or a task with fewer than two classes.
        """
        super().__init__(config, tasks, preprocessing, tokenizer)
        self.image_tower = image_tower(clip.visual)
        self.text_tower = text_tower(clip.text)
        self.logit_scale = clip.logit_scale
        width = config.width
        self.image_projection = Projection(self.image_tower.width, width)
        self.text_projection = Projection(self.text_tower.width, width)
        if config.sequence_attention:
            self.type_embedding = nn.Parameter(torch.empty(2, width))
            nn.init.normal_(self.type_embedding, std=0.02)
            self.sequence_attention = SequenceAttention(
                width, config.depth, config.heads, config.mlp_ratio, config.dropout
            )
        self.norm = nn.LayerNorm(width)
        if config.modality_attention:
            self.modality_attention = ModalityAttention(len(tasks), width, config.vectors == "task-and-modality")
        pooled = width if config.modality_attention else 2 * width
        self.heads = self.make_heads(pooled)
        if config.auxiliary_heads:
            self.auxiliary_heads = nn.ModuleList([self.make_heads(width) for _ in ("text", "image")])

    @property
    def weighs_modalities(self) -> bool:
        return self.config.modality_attention

    def forward(self, batch: Batch, with_attention: bool = False, capacity: int | None = None) -> Output:
        """Classifies a batch.

        In training every text and image is encoded, unless `batch.images` is empty. In evaluation those that are
        absent are not, and what occurs several times is encoded once.

        Args:
            batch: images `[B, 3, H, W]`, tokens `[B, L]`, text_lengths `[B]`, present `[B, 2]`.
            with_attention: also give the last sequence-wise layer's attention maps.
            capacity: room for text tokens, at least as many as the batch has. With it all shapes are known beforehand
                and the host never waits for the device, as a CUDA graph needs it; nothing is encoded only once.

        Returns:
            Logits `[B, C_task]` and modality weights `[B, 2]` of each task, and the embedding `[B, 2, D]`.
        """
        once = not self.training and capacity is None and not torch.compiler.is_compiling()
        text = self._text_tokens(batch, once, capacity)
        image = self._image_tokens(batch, once)
        towers = torch.stack([text.global_tokens(self.text_tower.global_first), image.global_tokens(True)], dim=1)
        attention = None
        if self.config.sequence_attention:
            embedding, attention = self._fuse(text, image, batch.present, capacity, with_attention)
        else:
            embedding = towers
        # what stands for an absent side may be anything, NaN too, which a product with 0 would keep
        there = batch.present[..., None]
        embedding = self.norm(torch.where(there, embedding, 0)) * there
        if not self.config.modality_attention:
            both = embedding.flatten(1)
            return Output(self.classify(self.heads, both), None, embedding, towers, attention)
        pooled, weights = self.modality_attention(embedding, batch.present)
        # one unbind, not a slice for each: the gradient of every slice would be as large as all of `pooled`
        parts = zip(self.tasks, self.heads, pooled.unbind(1), strict=True)
        logits = {task: head(part) for task, head, part in parts}
        modality_weights = dict(zip(self.tasks, weights.unbind(1), strict=True))
        return Output(logits, modality_weights, embedding, towers, attention)

    def _text_tokens(self, batch: Batch, once: bool, capacity: int | None) -> _Tokens:
        tokens, lengths, texts = batch.tokens, batch.text_lengths, None
        if once:
            texts = distinct_texts(tokens, lengths, batch.present[:, TEXT])
            if texts is not None:
                if len(texts.rows) == 0:
                    return self._no_tokens(batch)
                tokens, lengths = tokens[texts.rows], lengths[texts.rows]
        packed, rows = self.text_tower.packed(tokens, lengths, capacity)
        starts, counts = rows.starts, rows.cu_seqlens.diff()
        if texts is not None:
            starts, counts = starts[texts.of_row], counts[texts.of_row]
        values = run_linear(self.text_projection, packed)
        return _Tokens(values, starts, counts, rows.longest)

    def _image_tokens(self, batch: Batch, once: bool) -> _Tokens:
        images = distinct_images(batch.images, batch.present[:, IMAGE]) if once else None
        if batch.images.numel() == 0 or (images is not None and len(images.rows) == 0):
            return self._no_tokens(batch)
        tokens = self.image_tower(batch.images if images is None else batch.images[images.rows])
        length = tokens.shape[1]
        of_row = torch.arange(len(batch), device=tokens.device) if images is None else images.of_row
        values = run_linear(self.image_projection, tokens.flatten(0, 1))
        return _Tokens(values, of_row * length, torch.full_like(of_row, length), length)

    def _no_tokens(self, batch: Batch) -> _Tokens:
        none = torch.zeros_like(batch.text_lengths)
        return _Tokens(self.norm.weight.new_zeros(0, self.config.width), none, none, 0)

    def _fuse(
        self, text: _Tokens, image: _Tokens, present: Tensor, capacity: int | None, with_attention: bool
    ) -> tuple[Tensor, AttentionMaps | None]:
        """Sequence-wise attention over both: its two global tokens, `[B, 2, D]`.

        Where a modality is absent its place holds another token of the row, if there is one, for the caller to hide.
        """
        counts = torch.stack([text.counts, image.counts], dim=1) * present
        # with a capacity, what is behind the last row belongs to none
        room = None if capacity is None else capacity + len(present) * image.longest
        pack = pack_tokens if capacity is not None else _pack_tokens_uncompiled
        starts = torch.stack([text.starts, image.starts], dim=1)
        packed, cu_seqlens = pack(text.values, image.values, starts, counts, self.type_embedding, capacity=room)
        text_counts, total = counts[:, TEXT], len(packed)
        if total == 0:
            nothing = [text.values.new_zeros(0, 0) for _ in present]
            maps = AttentionMaps(nothing, text_counts.long()) if with_attention else None
            return text.values.new_zeros(len(present), 2, self.config.width), maps
        rows = Rows(cu_seqlens, text.longest + image.longest)

        first = torch.zeros_like(text_counts)
        position = first if self.text_tower.global_first else (text_counts - 1).clamp(min=0)
        index = torch.stack([rows.starts + position, rows.starts + text_counts], dim=1)
        last = (rows.cu_seqlens[1:] - 1).clamp(min=0)
        index = torch.minimum(index, last[:, None])
        queries = Queries(index.flatten().long(), Rows.equal(len(present), 2, index.device))
        if not with_attention:
            return self.sequence_attention(packed, rows, queries).view(len(present), 2, -1), None
        embedding, weights = self.sequence_attention.forward_with_weights(packed, rows, queries)
        return embedding.view(len(present), 2, -1), AttentionMaps(weights, text_counts.long())


# how many tokens come out depends on values, so this stands between compiled graphs
_pack_tokens_uncompiled = torch.compiler.disable(pack_tokens)


def create_model(
    name: str,
    tasks: Mapping[str, Sequence[str]],
    pretrained: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> CMACLIP:
    """Builds a CMA-CLIP on the towers of an open_clip model.

    Args:
        name: `tiny`, or any open_clip model name (`open_clip.list_models()`).
        tasks: for each task the names of its classes.
        pretrained: an open_clip tag (fetched by open_clip if it is not in its cache) or a local checkpoint; None
            starts from random weights. `tiny` takes none.
        tokenizer: for `tiny` a tokenizer trained on the data; None is the named model's own.
        options: fields of `ModelConfig` that differ from the named model's defaults.

    Raises:
        InputError: an unknown name, tag, or option; a checkpoint that does not fit the model.
    """
    return CMACLIP(*build_clip(system_config(CMACLIP, name, options), tasks, pretrained, tokenizer))


def build_clip(
    config: Any,
    tasks: Mapping[str, Sequence[str]],
    pretrained: str | Path | None,
    tokenizer: Tokenizer | None,
    modalities: tuple[bool, bool] = (True, True),
) -> tuple[Any, Mapping[str, Sequence[str]], CustomTextCLIP | CoCa | TinyCLIP, ImagePreprocessing, Tokenizer]:
    """What every system is made of: its configuration, completed; tasks; towers; preprocessing and tokenizer.

    Args:
        modalities: whether the system reads the text, and the image; a model that is built again has no other tower.
    """
    if config.name == "tiny":
        if pretrained is not None:
            raise InputError("'tiny' has no pretrained weights: leave out --pretrained, or name an open_clip model")
        tokenizer = tokenizer or OpenClipTokenizer("ViT-B-32", context_length=config.context_length)
        size, context = config.image_size or 96, tokenizer.context_length
        config = config.model_copy(update={"image_size": size, "context_length": context})
        try:
            pieces = tokenizer.pieces() if config.text_tower is None else [""]
            clip: CustomTextCLIP | CoCa | TinyCLIP = TinyCLIP(size, context, pieces, tokenizer.eot)
        except ValueError as error:
            raise InputError(f"model options: {error}") from None
        # white becomes 0, which is also what convolutions pad with
        preprocessing = ImagePreprocessing(size=size, mean=(1.0,) * 3, std=(0.5,) * 3, resize_mode="squash")
    elif config.clip is not None:
        assert tokenizer is not None, "an artefact has its tokenizer"
        clip = rebuild_open_clip(config, modalities)
        preprocessing = ImagePreprocessing(size=to_2tuple(clip.visual.image_size)[0])  # the artefact has the rest
    else:
        clip = _open_clip_model(config, pretrained)
        config = config.model_copy(update={"clip": note_open_clip(config, clip)})
        try:
            preprocessing = ImagePreprocessing.from_open_clip(open_clip.get_model_preprocess_cfg(clip))
        except ValueError as error:
            raise InputError(f"'{config.name}': {' '.join(str(error).split())}: choose another model") from None
        tokenizer = tokenizer or OpenClipTokenizer(config.name, context_length=config.context_length)
    if config.text_tower is not None or config.image_tower is not None:
        config, preprocessing, tokenizer = with_other_towers(config, clip, preprocessing, tokenizer)
    return config, tasks, clip, preprocessing, tokenizer


def _open_clip_model(config: Any, pretrained: str | Path | None) -> CustomTextCLIP | CoCa:
    name = config.name
    if not name.startswith(("hf-hub:", "local-dir:")) and open_clip.get_model_config(name) is None:
        import difflib

        near = difflib.get_close_matches(name, open_clip.list_models(), 3)
        hint = f": did you mean {', '.join(near)}?" if near else ": see open_clip.list_models()"
        raise InputError(f"'{name}' is neither 'tiny' nor an open_clip model{hint}")
    overrides: dict[str, Any] = {}
    if config.image_size is not None:
        overrides["force_image_size"] = config.image_size
    if config.context_length is not None:
        overrides["force_context_length"] = config.context_length
    try:
        with _quiet_open_clip():
            return open_clip.create_model(
                name,
                pretrained=None if pretrained is None else str(pretrained),
                pretrained_text=False,
                force_custom_text=True,
                weights_only=True,
                **overrides,
            )
    except Exception as error:
        # open_clip raises a bare RuntimeError for an unknown tag, a corrupt file and a missing dependency alike
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"open_clip cannot make '{name}' with weights '{pretrained}': {reason}") from error


@contextlib.contextmanager
def _quiet_open_clip() -> Iterator[None]:
    """open_clip logs each step of loading on the root logger; its errors still show."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)
