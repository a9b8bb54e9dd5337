"""Raw CLIP: each class is a sentence, and a pair belongs to the class whose sentence is nearest (arXiv 2103.00020).

Section 3.1.2: the classifier of a task is made by the text tower, from the class names put into prompt templates
(section 3.1.4: the mean over the templates). No label is learnt from. Without pretrained weights the towers are trained
by CLIP's contrastive loss on the pairs alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip import SIMPLE_IMAGENET_TEMPLATES, build_zero_shot_classifier
from pydantic import Field
from torch import Tensor

from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.modes import evaluation_copy
from cmaclip_fast.systems.base import SystemConfig, TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.types import Batch, Output


class ZeroShotConfig(SystemConfig):
    """
    Attributes:
        use: what is compared with the prompts: the image (CLIP), the text, or the mean of the logits of both.
        templates: for a task its prompts, each with one `{}` for the class, such as `["a {} drawing"]`; a task that is
            not named has the seven of open_clip's `SIMPLE_IMAGENET_TEMPLATES`.
    """

    use: Literal["both", "text", "image"] = "both"
    templates: dict[str, list[str]] = Field(default_factory=dict)


@register("clip-zero-shot")
class ZeroShotCLIP(TwoTowers):
    """The cosine of a pair's embeddings with the prompts of the classes, times CLIP's temperature."""

    title = "CLIP, zero-shot"
    Config = ZeroShotConfig
    uses_labels = False

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config.model_copy(update={"auxiliary_heads": False}), *parts)
        del self.text_projection, self.image_projection  # CLIP's own are used
        for task, templates in config.templates.items():
            if task not in self.tasks:
                raise InputError(f"templates: no task '{task}'; tasks: {', '.join(self.tasks)}")
            if not templates or any(template.count("{}") != 1 for template in templates):
                raise InputError(f"templates of '{task}': give at least one, each with one {{}} for the class")
        self._classifiers: tuple[list[tuple[int, int]], list[Tensor]] | None = None

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """As open_clip's: `tokens [N, L]` -> `[N, E]`."""
        lengths = self._lengths_of(tokens)
        encoded, counts = self.text_tower(tokens, lengths)
        rows = torch.arange(len(encoded), device=encoded.device)
        text = self.text_tower.project(encoded[rows, self.text_position(counts)])
        return F.normalize(text, dim=-1) if normalize else text

    def _lengths_of(self, tokens: Tensor) -> Tensor:
        is_end = tokens == self.tokenizer.eot
        is_end[:, 0] = False
        return (is_end.int().argmax(1) + 1).to(torch.int32)

    def classifiers(self) -> list[Tensor]:
        """For each task `[E, C_task]`, columns of length 1; made anew when the text tower's weights have changed."""
        weights = [*self.text_tower.parameters()]
        state = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
        if self._classifiers is not None and self._classifiers[0] == state:
            return self._classifiers[1]
        reader = evaluation_copy(self)  # prompts are read without dropout
        made = []
        for task, classes in self.tasks.items():
            templates: list[str] | list[Callable[[str], str]] = self.config.templates.get(task) or list(
                SIMPLE_IMAGENET_TEMPLATES
            )
            names = [name.replace("_", " ") for name in classes]
            made.append(
                build_zero_shot_classifier(
                    reader, self._tokens, names, templates, num_classes_per_batch=64, device=weights[0].device
                )
            )
        self._classifiers = state, made
        return made

    def _tokens(self, texts: list[str]) -> Tensor:
        return self.tokenizer.encode(texts)[0]

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        image, text = self.contrastive_features(batch)
        used = torch.tensor([self.config.use != "image", self.config.use != "text"], device=image.device)
        present = batch.present & used
        embedding = torch.where(present[..., None], torch.stack([text, image], dim=1), 0)
        share = present / present.sum(1, keepdim=True).clamp(min=1)
        mean = (embedding * share[..., None]).sum(1)
        scale = self.logit_scale.exp().clamp(max=100)
        logits = {
            task: scale * mean @ classes.to(mean.dtype)
            for task, classes in zip(self.tasks, self.classifiers(), strict=True)
        }
        return Output(logits, embedding=embedding)
