"""Floating-point operations of one forward, counted from the shapes: products of matrices alone, two a multiply-add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cmaclip_fast.systems.cma_clip import CMACLIP


@dataclass(frozen=True)
class Shape:
    """What the count needs to know of a model: an open_clip ViT and its causal text tower, fused.

    Attributes:
        patches: of an image; its tokens are one more.
        patch_pixels: numbers in a patch, channels counted.
        mlp: hidden width of the fusion's MLP.
        hidden: hidden width of each head.
        classes: of each task.
    """

    patches: int
    patch_pixels: int
    image_width: int
    image_layers: int
    image_mlp: int
    text_width: int
    text_layers: int
    text_mlp: int
    width: int
    depth: int
    mlp: int
    hidden: int
    classes: tuple[int, ...]

    @classmethod
    def of(cls, model: CMACLIP) -> Shape:
        """From the shapes of the model's weights."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        image, text = "image_tower.visual.", "text_tower.text."

        def layers(prefix: str) -> int:
            return 1 + max(int(name[len(prefix) :].split(".")[0]) for name in shapes if name.startswith(prefix))

        image_width, channels, height, width = shapes[image + "conv1.weight"]
        blocks, text_blocks = image + "transformer.resblocks.", text + "transformer.resblocks."
        return cls(
            patches=shapes[image + "positional_embedding"][0] - 1,
            patch_pixels=channels * height * width,
            image_width=image_width,
            image_layers=layers(blocks),
            image_mlp=shapes[blocks + "0.mlp.c_fc.weight"][0],
            text_width=shapes[text + "positional_embedding"][1],
            text_layers=layers(text_blocks),
            text_mlp=shapes[text_blocks + "0.mlp.c_fc.weight"][0],
            width=model.config.width,
            depth=layers("sequence_attention.layers."),
            mlp=shapes["sequence_attention.layers.0.mlp.0.weight"][0],
            hidden=shapes["heads.hidden.weight"][0] // len(model.tasks),
            classes=tuple(len(names) for names in model.tasks.values()),
        )


def layer(queries: int, keys: int, scores: float, width: int, mlp: int) -> float:
    """A transformer layer whose queries go on: keys and values of all tokens, all else of the queries alone."""
    return 4 * keys * width**2 + queries * (4 * width**2 + 4 * width * mlp) + 4 * scores * width


def image_tower(shape: Shape) -> float:
    """One image."""
    tokens = shape.patches + 1
    one = layer(tokens, tokens, tokens**2, shape.image_width, shape.image_mlp)
    return 2 * shape.patches * shape.patch_pixels * shape.image_width + shape.image_layers * one


def after_fusion(shape: Shape) -> float:
    """Keyless attention and the heads of one pair; two scores and a sum of two for each task."""
    heads = sum(2 * shape.width * shape.hidden + 2 * shape.hidden * classes for classes in shape.classes)
    return heads + len(shape.classes) * 2 * 4 * shape.width


def useful(shape: Shape, lengths: Sequence[int]) -> float:
    """What the outputs need: real tokens, the causal half of the text's scores, the last layer's two global tokens."""
    images = shape.patches + 1
    total = len(lengths) * (image_tower(shape) + after_fusion(shape))
    for length in lengths:
        tokens = length + images
        text = layer(length, length, length * (length + 1) / 2, shape.text_width, shape.text_mlp)
        projections = 2 * length * shape.text_width * shape.width + 2 * images * shape.image_width * shape.width
        whole = layer(tokens, tokens, tokens**2, shape.width, shape.mlp)
        last = layer(2, tokens, 2 * tokens, shape.width, shape.mlp)
        total += shape.text_layers * text + projections + (shape.depth - 1) * whole + last
    return total


def padded(shape: Shape, rows: int, length: int) -> float:
    """Operations of a system that pads every text to `length`, masks scores, and fuses all tokens in every layer."""
    images = shape.patches + 1
    tokens = length + images
    text = layer(length, length, length**2, shape.text_width, shape.text_mlp)
    projections = 2 * length * shape.text_width * shape.width + 2 * images * shape.image_width * shape.width
    fused = layer(tokens, tokens, tokens**2, shape.width, shape.mlp)
    one = image_tower(shape) + shape.text_layers * text + projections + shape.depth * fused + after_fusion(shape)
    return rows * one


def training(shape: Shape, rows: int, forward: float) -> float:
    """A training step of `rows` pairs: each product again for its inputs and for its weights; pixels need none."""
    return 3 * forward - rows * 2 * shape.patches * shape.patch_pixels * shape.image_width
