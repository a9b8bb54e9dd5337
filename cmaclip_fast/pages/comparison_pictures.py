"""Attention maps of a comparison's test rows, as in the paper's figure 2."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from cmaclip_fast.errors import one_line, visible
from cmaclip_fast.files import replacing
from cmaclip_fast.pages.explanation import relevant_token
from cmaclip_fast.pages.views import ExampleView

CAPTION_WIDTH = 24


def draw_attention(views: Sequence[ExampleView], path: Path) -> None:
    """Each row's picture, and on it the attention that its title's most relevant token gives to the patches.

    Nothing is drawn if no row has such a map.
    """
    shown = [view for view in views if relevant_token(view) is not None and view.image is not None]
    if not shown:
        return
    figure = Figure(figsize=(1.9 * len(shown), 4.4), layout="constrained")
    axes = figure.subplots(2, len(shown), squeeze=False)
    for column, view in enumerate(shown):
        token = relevant_token(view)
        assert token is not None and view.token_to_patch is not None and view.image is not None
        for row in range(2):
            axes[row, column].imshow(view.image)
            axes[row, column].set_axis_off()
        heat = Image.fromarray(view.token_to_patch[token].astype(np.float32)).resize(
            view.image.size, Image.Resampling.BICUBIC
        )
        axes[1, column].imshow(np.asarray(heat), cmap="inferno", alpha=0.6)
        title = textwrap.shorten(visible(view.text or ""), 2 * CAPTION_WIDTH, placeholder=" …")
        axes[0, column].set_title(textwrap.fill(title, CAPTION_WIDTH), fontsize=7, parse_math=False)
        axes[1, column].set_title(one_line(view.tokens[token]), fontsize=8, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
