"""Pretrained parts from local files: Hugging Face text encoders and timm image models in the place of a CLIP's towers.

Nothing is fetched. Weights are read from safetensors, or by `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from open_clip.timm_model import TimmModel
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from tokenizers import Tokenizer as Engine
from torch import Tensor, nn

from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.tokenizer import Tokenizer, tokenizer_from_dict
from cmaclip_fast.errors import InputError

if TYPE_CHECKING:
    from open_clip.hf_model import HFTextEncoder

Config = TypeVar("Config", bound=BaseModel)


class HuggingFaceText(BaseModel):
    """What a Hugging Face text tower is built from again, its weights apart.

    Attributes:
        config: the encoder's own configuration.
        mean: its global token is the mean of its tokens (sentence-transformers), else its first token (BERT).
    """

    model_config = ConfigDict(extra="forbid")

    config: dict[str, Any]
    mean: bool


class TimmImage(BaseModel):
    """What a timm image tower is built from again, its weights apart.

    Attributes:
        read: it started from weights of a file, not from random ones.
    """

    model_config = ConfigDict(extra="forbid")

    model: str
    read: bool = False


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` of Hugging Face's fast tokenizers; the whole of it is kept in the artefact.

    Attributes:
        mask: the token that stands for a hidden one, or None.
    """

    def __init__(self, engine: Engine, context_length: int, pad: int) -> None:
        self._engine = engine
        engine.no_padding()
        engine.enable_truncation(context_length)
        ends = engine.encode("").ids
        if len(ends) < 2:
            raise InputError("tokenizer.json puts no start and end token around a text: choose a BERT-like encoder")
        self.bos, self.eot, self.pad = ends[0], ends[-1], pad
        marks = (engine.token_to_id(name) for name in ("[MASK]", "<mask>"))
        self.mask: int | None = next((mark for mark in marks if mark is not None), None)
        self.context_length = context_length
        self.vocab_size = engine.get_vocab_size()

    @classmethod
    def from_folder(cls, folder: Path, context_length: int, pad: int) -> HuggingFaceTokenizer:
        """
        Raises:
            InputError: there is no `tokenizer.json`, or it is damaged.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: missing: save the encoder's fast tokenizer there (`tokenizer.save_pretrained`)")
        try:
            engine = Engine.from_file(str(path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise InputError(f"{path}: no tokenizer ({' '.join(str(error).split())[:200]}): restore it") from None
        return cls(engine, context_length, pad)

    def encode(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor, int]:
        encodings = self._engine.encode_batch([text or "" for text in texts])
        tokens = torch.full((len(encodings), self.context_length), self.pad, dtype=torch.int64)
        for row, encoding in enumerate(encodings):
            tokens[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        lengths = torch.tensor([len(encoding.ids) for encoding in encodings], dtype=torch.int32)
        return tokens, lengths, sum(bool(encoding.overflowing) for encoding in encodings)

    def decode_tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        pieces = [self._engine.id_to_token(int(i)) or "" for i in ids]
        return [piece.removeprefix("##").replace("▁", "").replace("Ġ", "") for piece in pieces]

    def to_dict(self) -> dict[str, Any]:
        return {
            "type": "hugging-face",
            "context_length": self.context_length,
            "pad": self.pad,
            "tokenizer": self._engine.to_str(),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> HuggingFaceTokenizer:
        return cls(Engine.from_str(state["tokenizer"]), state["context_length"], state["pad"])


def load_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer of an artefact, of whatever kind."""
    if state.get("type") == "hugging-face":
        return HuggingFaceTokenizer.from_dict(state)
    return tokenizer_from_dict(state)


def with_other_towers(
    config: Config, clip: nn.Module, preprocessing: ImagePreprocessing, tokenizer: Tokenizer
) -> tuple[Config, ImagePreprocessing, Tokenizer]:
    """Puts the towers that `config` asks for in the place of `clip.text` and `clip.visual`.

    Returns:
        The configuration with all that builds the towers again, and what they read.

    Raises:
        InputError: a folder or file is missing or damaged, a name is unknown, or a library is missing.
    """
    changes: dict[str, Any] = {}
    text: str | HuggingFaceText | None = config.text_tower  # type: ignore[attr-defined]
    image: str | TimmImage | None = config.image_tower  # type: ignore[attr-defined]
    embed = clip.text.output_dim  # type: ignore[union-attr]
    if text is not None:
        length = config.context_length or 64  # type: ignore[attr-defined]
        clip.text, changes["text_tower"], pad, most = _text_tower(text, embed)  # type: ignore[arg-type]
        if isinstance(text, str):
            tokenizer = HuggingFaceTokenizer.from_folder(Path(text), min(length, most), pad)
        changes["context_length"] = tokenizer.context_length
    if image is not None:
        size = config.image_size or preprocessing.size  # type: ignore[attr-defined]
        clip.visual, changes["image_tower"], preprocessing = _image_tower(image, embed, size)  # type: ignore[arg-type]
        changes["image_size"] = size
    return config.model_copy(update=changes), preprocessing, tokenizer


def _text_tower(text: str | HuggingFaceText, embed: int) -> tuple[HFTextEncoder, HuggingFaceText, int, int]:
    """The encoder; what it is built from again; its padding token and its longest text."""
    try:
        import transformers
        from open_clip.hf_model import HFTextEncoder
    except ImportError:
        raise InputError("a Hugging Face text tower needs transformers: pip install 'cmaclip_fast[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    if isinstance(text, str):
        folder = Path(text)
        if not (folder / "config.json").is_file():
            raise InputError(f"{text}: no config.json in it: name a folder that a Hugging Face encoder was saved to")
        try:
            settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
            transformer = transformers.AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{text}: cannot be read as a Hugging Face encoder ({reason}): name another") from None
        built = HuggingFaceText(config=settings.to_diff_dict(), mean=_pools_by_mean(folder))
    else:
        values = dict(text.config)
        settings = transformers.AutoConfig.for_model(values.pop("model_type"), **values)
        transformer = transformers.AutoModel.from_config(settings)
        built = text
    if settings.is_encoder_decoder:
        transformer = transformer.get_encoder()
    if getattr(transformer, "pooler", None) is not None:
        transformer.pooler = None  # BERT's own, for a task that is not ours
    try:
        pooling = "mean_pooler" if built.mean else "cls_last_hidden_state_pooler"
        encoder = HFTextEncoder("", embed, config=settings, pooler_type=pooling, proj_type="linear")
    except KeyError:
        raise InputError(
            f"text encoder of type '{settings.model_type}' is not one open_clip knows: use a BERT"
        ) from None
    encoder.transformer = transformer
    most = getattr(settings, "max_position_embeddings", 512)
    return encoder, built, int(settings.pad_token_id or 0), most


def _pools_by_mean(folder: Path) -> bool:
    """What sentence-transformers noted; a plain encoder pools its first token."""
    note = folder / "1_Pooling" / "config.json"
    return note.is_file() and bool(json.loads(note.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens"))


def _image_tower(image: str | TimmImage, embed: int, size: int) -> tuple[TimmModel, TimmImage, ImagePreprocessing]:
    import timm

    name, _, weights = image.partition(":") if isinstance(image, str) else (image.model, "", "")
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f": did you mean {', '.join(near)}?" if near else ": see timm.list_models()"
        raise InputError(f"timm has no model '{name}'{hint}")
    visual = TimmModel(name, embed, size, pool="", proj="linear")
    trunk = visual.trunk
    if hasattr(trunk, "set_input_size"):
        trunk.set_input_size(img_size=(size, size))
    if weights:
        if not Path(weights).is_file():
            raise InputError(f"{weights}: missing: name a file with weights of '{name}', as {name}:FILE")
        try:
            # what is left over is the classifier of the data that the weights were trained on
            timm.models.load_checkpoint(trunk, weights, strict=False, weights_only=True)
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{weights}: no weights of '{name}' ({reason}): name another file") from None
    data = timm.data.resolve_model_data_config(trunk)
    preprocessing = ImagePreprocessing(size=size, mean=tuple(data["mean"]), std=tuple(data["std"]))
    read = bool(weights) or (isinstance(image, TimmImage) and image.read)
    return visual, TimmImage(model=name, read=read), preprocessing
