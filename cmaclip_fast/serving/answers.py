"""What `Classifier` says, as the endpoints give it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from cmaclip_fast.pages.views import ExampleView
from cmaclip_fast.serving.schemas import Candidate, Explanation, Prediction


def predictions_of(row: Mapping[str, Any]) -> dict[str, Prediction]:
    """The predictions of a row, by task."""
    return {
        task: Prediction(
            label=list(said.label) if isinstance(said.label, tuple) else said.label,
            status=said.status,
            probability=said.probability,
            top=_candidates(said.top),
            text_weight=said.text_weight,
            image_weight=said.image_weight,
        )
        for task, said in row.items()
    }


def explanation_of(view: ExampleView) -> Explanation:
    """What the model looked at in a row."""
    predictions = {}
    for task, said in view.predictions.items():
        text, image = said.weights or (None, None)
        predictions[task] = Prediction(
            label=said.predicted if said.status in (None, "accepted") else None,
            status=said.status,
            probability=said.probability,
            top=_candidates(said.top),
            text_weight=text,
            image_weight=image,
        )
    return Explanation(
        predictions=predictions,
        image=None if view.image is None else as_png(view.image),
        tokens=view.tokens,
        text_to_token=_numbers(view.text_global_to_token),
        image_to_patch=_numbers(view.image_global_to_patch),
        token_to_patch=_numbers(view.token_to_patch),
    )


def as_png(image: Image.Image) -> str:
    """The file of a picture, in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _candidates(top: Any) -> list[Candidate]:
    return [Candidate(label=label, probability=probability) for label, probability in top]


def _numbers(values: np.ndarray | None) -> Any:
    """Nested lists, with the digits that matter for a picture."""
    return None if values is None else np.asarray(values, np.float64).round(6).tolist()
