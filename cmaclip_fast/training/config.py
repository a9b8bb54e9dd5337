"""How a model is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cmaclip_fast.data.augment import Augmentation
from cmaclip_fast.evaluation.calibration import Method


class TrainingConfig(BaseModel):
    """How a model is trained. The defaults fit fine-tuning a pretrained CLIP; presets have their own (`presets.py`).

    Attributes:
        epochs: passes over the training rows.
        batch_size: rows of a step (on each device).
        learning_rate: peak, for projections, attention and heads.
        tower_learning_rate: peak, for the two towers.
        fusion_learning_rate: peak, of the layers that fuse the modalities; None is `learning_rate`.
        fusion_warmup: share of the steps with a rising rate of those layers; None is `warmup`.
        heads_first: epochs, before all layers train, that train the heads alone, so that towers and fusion are not
            changed by heads that know nothing yet (LP-FT, arXiv 2202.10054); fewer than `epochs`.
        tower_decay: factor of a tower layer's rate for each layer above it; 1 trains all layers alike.
        weight_decay: AdamW's, not on norms, biases and embeddings of position, type or class.
        warmup: share of all steps with a rising rate; a cosine follows, down to 1 % of the peak.
        clip_norm: largest norm of the gradient.
        label_smoothing: share of the probability spread over all classes; not for multi-label tasks.
        class_weights: of the loss: `balanced`, `effective-number`, or for some tasks the weights of some classes; None
            weighs all alike (`imbalance.py`).
        logit_adjustment: factor of the log priors that are added to the logits in training; 0 adds nothing, 1 is usual.
            Multi-label tasks have none.
        gamma_positive, gamma_negative: exponents of the loss of multi-label tasks for the classes that a row has, and
            for those it has not, which are many: 0 is binary cross-entropy, equal ones the focal loss, and 0 and 4 are
            usual for the asymmetric loss (see `ops.multitask_binary_cross_entropy`).
        margin: probabilities up to it cost nothing for a class that a row has not; 0.05 is usual for the asymmetric
            loss.
        balanced_sampling: draw rows with repetition, so that tasks and classes come equally often.
        text_dropout, image_dropout: how often a row's text, or its picture, is hidden in training, where it has both.
        mismatch: share of the rows that are given another row's text, so that the training texts are not learnt by
            heart. Such a pair teaches only the tasks that the model's modality weights say it judges by the picture;
            a system without such weights is given none.
        augmentation: random changes of pictures and texts in training; None for none.
        auxiliary_weight: of the loss of the model's auxiliary heads.
        small_epochs: share of the epochs, the first ones and never all, that see pictures of two thirds the side, at
            half the cost; only for `tiny`.
        pretrained_learning_rate: peak, for a Hugging Face text tower and for a timm image tower with weights of a file.
        contrastive_epochs: passes over the training pairs with CLIP's own loss before the tasks.
        ema_decay: of the running average of the weights, which is what is evaluated and kept; 0 for none.
        patience: epochs without a better validation score before training stops; 0 for never. The score counts from
            the first epoch with pictures of full size.
        mixed_precision: dtype of the products in the forward pass, `bf16` or `fp16`; `no` is float32, and `auto` is
            `bf16` on a GPU that has it, else `no`.
        accumulate: batches whose gradients are added up before a step.
        checkpointing: keep only what goes into each transformer layer and compute the layer again for its gradient:
            less memory, about a third more work.
        compile: run through `torch.compile`; the first steps take minutes.
        lora_rank: of the low-rank adapters (LoRA) that are trained in place of the towers' own weights, at
            `learning_rate`, and are added to those weights at the end; 0 trains the towers themselves. Needs peft.
        calibration: of the probabilities, on the validation rows: by a `temperature` for each task, or by a `vector` of
            temperatures and biases of the classes, which fits more and needs more rows.
        class_thresholds: give each class with enough validation rows a threshold of its own.
        workers: processes that load data; `auto` chooses their number from the time that the first batches and steps
            take. It changes the speed alone.
        seed: of weights, order and augmentation; a run on CPU repeats bit for bit on the same machine.
    """

    model_config = ConfigDict(extra="forbid")

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(1e-3, gt=0)
    tower_learning_rate: float = Field(1e-5, ge=0)
    pretrained_learning_rate: float = Field(5e-5, ge=0)
    fusion_learning_rate: float | None = Field(None, gt=0)
    fusion_warmup: float | None = Field(None, ge=0, lt=1)
    heads_first: int = Field(0, ge=0)
    tower_decay: float = Field(1.0, gt=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)
    clip_norm: float = Field(1.0, gt=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    class_weights: Literal["balanced", "effective-number"] | dict[str, dict[str, float]] | None = None
    logit_adjustment: float = Field(0.0, ge=0, le=10)
    gamma_positive: float = Field(0.0, ge=0, le=100)
    gamma_negative: float = Field(0.0, ge=0, le=100)
    margin: float = Field(0.0, ge=0, lt=1)
    balanced_sampling: bool = False
    text_dropout: float = Field(0.1, ge=0, le=1)
    image_dropout: float = Field(0.1, ge=0, le=1)
    mismatch: float = Field(0.0, ge=0, lt=1)
    augmentation: Augmentation | None = Field(default_factory=Augmentation)
    auxiliary_weight: float = Field(0.5, ge=0)
    small_epochs: float = Field(0.0, ge=0, lt=1)
    contrastive_epochs: int = Field(0, ge=0)
    ema_decay: float = Field(0.0, ge=0, lt=1)
    patience: int = Field(0, ge=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    accumulate: int = Field(1, ge=1)
    checkpointing: bool = False
    compile: bool = False
    lora_rank: int = Field(0, ge=0)
    calibration: Method = "temperature"
    class_thresholds: bool = False
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _all_layers_train(self) -> TrainingConfig:
        if self.heads_first >= self.epochs:
            raise ValueError(f"heads_first {self.heads_first} leaves no epoch of {self.epochs} for the other layers")
        return self

    @model_validator(mode="after")
    def _one_side_is_left(self) -> TrainingConfig:
        if self.text_dropout + self.image_dropout > 1:
            raise ValueError("text_dropout and image_dropout together are over 1, which leaves rows with neither")
        return self
