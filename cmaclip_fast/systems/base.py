"""The interface of all systems, and the base class of those with two towers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import Transformer
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from cmaclip_fast.data.named import Taxonomy
from cmaclip_fast.data.preprocess import MAX_IMAGE_SIZE, ImagePreprocessing
from cmaclip_fast.data.tokenizer import MAX_CONTEXT, Tokenizer
from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.blocks import Projection, SequenceAttention
from cmaclip_fast.nn.heads import TaskHeads
from cmaclip_fast.nn.towers import image_tower, text_tower
from cmaclip_fast.systems.pretrained import HuggingFaceText, OpenClipModel, TimmImage
from cmaclip_fast.types import IMAGE, TEXT, Batch, Output


class System(nn.Module):
    """A `Batch` in, an `Output` out. A new system says what it is in one file, under `@register("its-name")`.

    Attributes:
        Config: the class of its configuration.
        system: the name it is registered under.
        title: its name in reports.
        modalities: whether it reads the text, and the image.
        per_task: the names of parameters with a row for each task, beside the heads.
        fusion: the beginnings of the names of the parameters that fuse the modalities.
        uses_labels: False for a system that learns from pairs alone, by CLIP's contrastive loss.
        config, tasks, preprocessing, tokenizer: as in `CMACLIP`.
        taxonomies: the tasks that are levels of a tree; see `task_probabilities`.
        multi_label: the tasks whose rows have any number of classes.
        applies: the tasks for which whether they apply is a task of its own (see `applies_task`).
        image_tower, text_tower: see `towers.py`; a system that does not read a modality has no tower for it.
        logit_scale: CLIP's temperature.
    """

    Config: ClassVar[type[BaseModel]]
    system: ClassVar[str] = ""
    title: ClassVar[str] = ""
    modalities: ClassVar[tuple[bool, bool]] = (True, True)
    per_task: ClassVar[tuple[str, ...]] = ()
    fusion: ClassVar[tuple[str, ...]] = ()
    uses_labels: ClassVar[bool] = True

    config: Any
    tasks: dict[str, list[str]]
    taxonomies: tuple[Taxonomy, ...] = ()
    multi_label: tuple[str, ...] = ()
    applies: tuple[str, ...] = ()
    preprocessing: ImagePreprocessing
    tokenizer: Tokenizer
    image_tower: Any
    text_tower: Any
    logit_scale: nn.Parameter
    heads: nn.Module
    auxiliary_heads: nn.ModuleList

    def __init__(
        self, config: Any, tasks: Mapping[str, Sequence[str]], preprocessing: ImagePreprocessing, tokenizer: Tokenizer
    ) -> None:
        """
        Raises:
            InputError: no task, or a task with fewer than two classes.
        """
        super().__init__()
        if not tasks:
            raise InputError("a model needs at least one task: name a label column")
        for task, classes in tasks.items():
            if len(classes) < 2:
                raise InputError(f"task '{task}' has {len(classes)} class(es): a task needs at least two")
        self.config = config
        self.tasks = {task: list(classes) for task, classes in tasks.items()}
        self.preprocessing = preprocessing
        self.tokenizer = tokenizer

    def make_heads(self, width: int) -> TaskHeads:
        """An MLP for each task, in their order, that reads `[B, width]`, or `[B, K, width]` for K tasks."""
        classes = [len(names) for names in self.tasks.values()]
        return TaskHeads(width, self.config.head_hidden or self.config.width, classes, self.config.head_dropout)

    def by_task(self, packed: Tensor) -> dict[str, Tensor]:
        """`packed [B, C]`, the tasks' logits side by side -> for each task a view of it, `[B, C_task]`."""
        classes = [len(names) for names in self.tasks.values()]
        return dict(zip(self.tasks, packed.split(classes, dim=1), strict=True))

    def output(self, packed: Tensor, **rest: Any) -> Output:
        """The output of logits `packed [B, C]`, as heads give them; `rest` are the other fields of `Output`."""
        return Output(self.by_task(packed), packed=packed, **rest)

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        """Classifies a batch; missing sides have no influence."""
        raise NotImplementedError

    def extra_losses(self, batch: Batch, output: Output) -> dict[str, Tensor]:
        """Losses of training beside the tasks' own, each a scalar, weighted already; called after `forward`."""
        return {}

    @property
    def weighs_modalities(self) -> bool:
        """Whether `forward` gives modality weights."""
        return False

    @property
    def has_auxiliary_heads(self) -> bool:
        """Whether `auxiliary_logits` can be asked for."""
        return all(self.modalities) and bool(getattr(self.config, "auxiliary_heads", False))

    def auxiliary_logits(self, output: Output, modality: int) -> Tensor:
        """What the tower of a modality, `TEXT` or `IMAGE`, says of the tasks alone: `[B, C]`, side by side.

        Raises:
            ValueError: the system was built without auxiliary heads.
        """
        if not self.has_auxiliary_heads or output.towers is None:
            raise ValueError("the system was built without auxiliary_heads")
        logits: Tensor = self.auxiliary_heads[modality](output.towers[:, modality])
        return logits

    def contrastive_features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The towers' own embeddings of images and texts, each `[B, E]` and of length 1, as CLIP compares them."""
        image = self.image_tower.project(self.image_tower.global_tokens(batch.images))
        text = self.text_tower.project(self.text_tower.global_tokens(batch.tokens, batch.text_lengths))
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    def text_position(self, lengths: Tensor) -> Tensor:
        """`[B]`, where the global token of each text of the text tower is."""
        return torch.zeros_like(lengths) if self.text_tower.global_first else lengths - 1

    def tower_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The named parameters of the two towers, which train at their own rate."""
        for prefix in ("image_tower", "text_tower"):
            for name, parameter in getattr(self, prefix, nn.Identity()).named_parameters():
                yield f"{prefix}.{name}", parameter

    def set_checkpointing(self, enabled: bool = True) -> None:
        """Whether each transformer layer is computed again for its gradient instead of keeping what is inside it."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.grad_checkpointing = enabled
            elif isinstance(module, SequenceAttention):
                module.checkpointing = enabled
            elif isinstance(module, TimmModel):
                module.set_grad_checkpointing(enabled)
            elif isinstance(module, HFTextEncoder):
                switch = "gradient_checkpointing_enable" if enabled else "gradient_checkpointing_disable"
                getattr(module.transformer, switch)()


class SystemConfig(BaseModel):
    """What every system on two towers is built from; the fields that it adds are its own.

    Attributes:
        name: `tiny`, or an open_clip model name.
        image_size: pixels a side; None keeps the named model's.
        context_length: most tokens of a text; None keeps the named model's.
        text_tower: a folder with a Hugging Face encoder that takes the place of the named model's text tower; once
            built, what such a tower is built from again without that folder.
        image_tower: a timm model's name, with weights if wanted, that takes the place of the image tower.
        clip: once built, what the named open_clip model is built from again without its name; None for `tiny`.
        width: D, into which the tokens of both towers are projected.
        head_hidden: hidden width of each task's MLP; None is `width`.
        head_dropout: inside each task's MLP.
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
    head_hidden: int | None = Field(None, gt=0)
    head_dropout: float = Field(0.0, ge=0, lt=1)
    auxiliary_heads: bool = False


class FusionConfig(SystemConfig):
    """Of a system that fuses by a transformer.

    Attributes:
        depth: its layers.
        heads: attention heads of each; divides `width`.
        mlp_ratio: hidden width of each layer's MLP, in widths.
        dropout: in each layer.
    """

    depth: int = Field(4, ge=1)
    heads: int = Field(8, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits_together(self) -> FusionConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


@dataclass
class Encoded:
    """The towers' outputs for a batch, projected to the system's width.

    Attributes:
        text: `[B, L, D]`; `text_lengths` `[B]` int32 says how many of each row are tokens.
        image: `[B, 1 + P, D]`, the global token first.
        globals: `[B, 2, D]`, the global tokens of text and image; undefined where absent.
        text_position: `[B]`, where the text's global token is in `text`.
    """

    text: Tensor
    text_lengths: Tensor
    image: Tensor
    globals: Tensor
    text_position: Tensor


class TwoTowers(System):
    """A system on the towers of one CLIP, each projected into one width, with a head for each task."""

    Config: ClassVar[type[BaseModel]] = SystemConfig
    config: Any

    def __init__(
        self,
        config: Any,
        tasks: Mapping[str, Sequence[str]],
        clip: Any,
        preprocessing: ImagePreprocessing,
        tokenizer: Tokenizer,
    ) -> None:
        """Use `create_system`, which finds `clip`, `preprocessing` and `tokenizer` for a name.

        Raises:
            InputError: no task, or a task with fewer than two classes.
        """
        super().__init__(config, tasks, preprocessing, tokenizer)
        if self.modalities[TEXT]:
            self.text_tower = text_tower(clip.text)
            self.text_projection = Projection(self.text_tower.width, config.width)
        if self.modalities[IMAGE]:
            self.image_tower = image_tower(clip.visual)
            self.image_projection = Projection(self.image_tower.width, config.width)
        if all(self.modalities):
            self.logit_scale = clip.logit_scale
            if config.auxiliary_heads:
                self.auxiliary_heads = nn.ModuleList([self.make_heads(config.width) for _ in ("text", "image")])

    def encode(self, batch: Batch) -> Encoded:
        """Runs both towers and projects their tokens."""
        image = self.image_projection(self.image_tower(batch.images))
        tokens, lengths = self.text_tower(batch.tokens, batch.text_lengths)
        text, position = self.text_projection(tokens), self.text_position(lengths)
        rows = torch.arange(len(text), device=text.device)
        return Encoded(text, lengths, image, torch.stack([text[rows, position], image[:, 0]], dim=1), position)
