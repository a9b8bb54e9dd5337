"""Pretrained parts from local files: Hugging Face text encoders and timm image models in the place of a CLIP's towers.

Nothing is fetched. Weights are read from safetensors, or by `torch.load(weights_only=True)`. What an artefact says of a
tower is held against what is known here before any library reads it: several take a name for an address, or for code.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import open_clip
import torch
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from tokenizers import Tokenizer as Engine
from torch import Tensor, nn

from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.tokenizer import MAX_CONTEXT, Tokenizer, checked_state, engine_from, tokenizer_from_dict
from cmaclip_fast.errors import InputError
from cmaclip_fast.types import IMAGE, TEXT

if TYPE_CHECKING:
    from open_clip.hf_model import HFTextEncoder

Config = TypeVar("Config", bound=BaseModel)


class HuggingFaceText(BaseModel):
    """Everything needed to rebuild a Hugging Face text tower, except its weights.

    Attributes:
        config: the encoder's own configuration.
        mean: its global token is the mean of its tokens (sentence-transformers), else its first token (BERT).
    """

    model_config = ConfigDict(extra="forbid")

    config: dict[str, Any]
    mean: bool


class OpenClipModel(BaseModel):
    """What the towers of an open_clip model are built from again, their weights apart.

    Attributes:
        config: open_clip's own configuration.
        text: its text tower, where that is a Hugging Face encoder: the encoder's configuration.
    """

    model_config = ConfigDict(extra="forbid")

    config: dict[str, Any]
    text: dict[str, Any] | None = None


class TimmImage(BaseModel):
    """Everything needed to rebuild a timm image tower, except its weights.

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
        try:
            ends = engine.encode("").ids
        except Exception as error:  # tokenizers raises a bare Exception
            raise InputError(f"tokenizer.json cannot be used ({' '.join(str(error).split())[:200]})") from None
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

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        encodings = self._engine.encode_batch(texts)
        tokens = torch.full((len(encodings), self.context_length), self.pad, dtype=torch.int64)
        for row, encoding in enumerate(encodings):
            tokens[row, : len(encoding.ids)] = torch.tensor(encoding.ids)
        lengths = torch.tensor([len(encoding.ids) for encoding in encodings], dtype=torch.int32)
        return tokens, lengths, torch.tensor([bool(encoding.overflowing) for encoding in encodings])

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
        read = checked_state(HuggingFaceState, state)
        return cls(engine_from(read.tokenizer), read.context_length, read.pad)


class HuggingFaceState(BaseModel):
    """A `HuggingFaceTokenizer` in an artefact."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["hugging-face"]
    context_length: int = Field(ge=3, le=MAX_CONTEXT)
    pad: int = Field(ge=0)
    tokenizer: str


def load_tokenizer(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer of an artefact, of whatever kind.

    Raises:
        InputError: as `tokenizer_from_dict`.
    """
    if state.get("type") == "hugging-face":
        return HuggingFaceTokenizer.from_dict(state)
    return tokenizer_from_dict(state)


_PLACEHOLDERS = {
    "text_cfg": {"width": 8, "heads": 1, "layers": 1, "vocab_size": 8, "context_length": 8},
    "vision_cfg": {"width": 8, "head_width": 8, "layers": 1, "patch_size": 16, "image_size": 16},
}
"""Towers that take no room, in the place of those that are not used or that are put in later."""

_ELSEWHERE = {
    "text_cfg": {"hf_model_name", "hf_model_pretrained", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs"},
    "vision_cfg": {"timm_model_pretrained"},
}
"""What of a configuration would be looked for elsewhere; an artefact has it itself."""


def note_open_clip(config: Any, clip: nn.Module) -> OpenClipModel:
    """All that `rebuild_open_clip` needs of the open_clip model `clip` that was made for `config`."""
    made = dict(open_clip.get_model_config(config.name.replace("/", "-") if ":" not in config.name else config.name))
    for unused in ("custom_text", "multimodal_cfg"):
        made.pop(unused, None)
    for part, elsewhere in _ELSEWHERE.items():
        made[part] = {name: value for name, value in made[part].items() if name not in elsewhere}
    if config.image_size is not None:
        made["vision_cfg"]["image_size"] = config.image_size
    if config.context_length is not None:
        made["text_cfg"]["context_length"] = config.context_length
    settings = getattr(clip.text, "config", None)  # of a Hugging Face encoder
    return OpenClipModel(config=made, text=None if settings is None else _encoder_values(settings))


def rebuild_open_clip(config: Any, modalities: tuple[bool, bool]) -> CustomTextCLIP:
    """The model that `config.clip` tells of, with random weights; nothing but `config` is read.

    Args:
        modalities: whether text and image are read; a tower that is not, or that another will replace, is a stub.

    Raises:
        InputError: the configuration names what is elsewhere.
    """
    made = dict(config.clip.config)
    text = config.clip.text if modalities[TEXT] and config.text_tower is None else None
    for part, elsewhere in _ELSEWHERE.items():
        if not isinstance(made.get(part), dict):
            raise InputError(f"field 'model.clip.config.{part}': is missing, or no object")
        made[part] = dict(made[part])
        if found := sorted(elsewhere & made[part].keys()):
            raise InputError(f"field 'model.clip.config.{part}.{found[0]}': an artefact names nothing elsewhere")
    pooling, projection = (made["text_cfg"].pop(f"hf_{key}_type", None) for key in ("pooler", "proj"))
    if not modalities[TEXT] or config.text_tower is not None or text is not None:
        made["text_cfg"] = _PLACEHOLDERS["text_cfg"]
    if not modalities[IMAGE] or config.image_tower is not None:
        made["vision_cfg"] = _PLACEHOLDERS["vision_cfg"]
    timm_name = made["vision_cfg"].get("timm_model_name")
    if timm_name is not None:
        _check_timm_name(timm_name)
    clip = CustomTextCLIP(**made)
    if text is not None:
        clip.text = _rebuild_encoder(text, made["embed_dim"], pooling or "mean_pooler", projection or "mlp")
    if timm_name is not None and config.image_size is not None:
        clip.visual.set_input_size(config.image_size)
    return clip


def _encoder_values(settings: Any) -> dict[str, Any]:
    """A Hugging Face encoder's own numbers and names, without what concerns files, devices or other tasks."""
    known = _own_names(type(settings))
    values = {name: value for name, value in settings.to_dict().items() if name in known}
    return {"model_type": settings.model_type, **{k: v for k, v in values.items() if isinstance(v, _SCALARS)}}


_SCALARS = (str, int, float, type(None))


def _own_names(kind: type) -> set[str]:
    """The parameters that a class of configurations adds to those of all."""
    import transformers

    base = inspect.signature(transformers.PretrainedConfig.__init__).parameters
    return set(inspect.signature(kind.__init__).parameters) - set(base)  # type: ignore[misc]


def _encoder_settings(values: dict[str, Any]) -> Any:
    """The configuration that an artefact has of a Hugging Face encoder.

    Raises:
        InputError: it is of a kind that open_clip does not know, or has more than such an encoder's own values.
    """
    import transformers
    from open_clip.hf_configs import arch_dict

    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in arch_dict:
        raise InputError(f"text encoder of type '{kind}' is not one open_clip knows: use a BERT")
    config = transformers.models.auto.configuration_auto.CONFIG_MAPPING[kind]
    for name, value in values.items():
        if name != "model_type" and (name not in _own_names(config) or not isinstance(value, _SCALARS)):
            raise InputError(f"text encoder: '{name}' is no number or name that describes a '{kind}'")
    return config(**{name: value for name, value in values.items() if name != "model_type"})


def _rebuild_encoder(values: dict[str, Any], embed: int, pooling: str, projection: str) -> HFTextEncoder:
    """An encoder inside open_clip with random weights."""
    try:
        from open_clip.hf_model import HFTextEncoder
    except ImportError:
        raise InputError("a Hugging Face text tower needs transformers: pip install 'cmaclip_fast[hf]'") from None
    settings = _encoder_settings(values)
    encoder = HFTextEncoder("", embed, config=settings, pooler_type=pooling, proj_type=projection)
    if settings.is_encoder_decoder:
        encoder.transformer = encoder.transformer.get_encoder()
    if pooling != "cls_pooler" and getattr(encoder.transformer, "pooler", None) is not None:
        encoder.transformer.pooler = None  # BERT's own, for a task that is not ours
    return encoder


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
    except ImportError:
        raise InputError("a Hugging Face text tower needs transformers: pip install 'cmaclip_fast[hf]'") from None
    transformers.utils.logging.disable_progress_bar()
    transformer = None
    if isinstance(text, str):
        folder = Path(text)
        if not (folder / "config.json").is_file():
            raise InputError(f"{text}: no config.json in it: name a folder that a Hugging Face encoder was saved to")
        try:
            settings = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            transformer = transformers.AutoModel.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{text}: cannot be read as a Hugging Face encoder ({reason}): name another") from None
        text = HuggingFaceText(config=_encoder_values(settings), mean=_pools_by_mean(folder))
    pooling = "mean_pooler" if text.mean else "cls_last_hidden_state_pooler"
    encoder = _rebuild_encoder(text.config, embed, pooling, "linear")
    if transformer is not None:
        if settings.is_encoder_decoder:
            transformer = transformer.get_encoder()
        if getattr(transformer, "pooler", None) is not None:
            transformer.pooler = None
        encoder.transformer = transformer
    most = getattr(encoder.config, "max_position_embeddings", 512)
    return encoder, text, int(encoder.config.pad_token_id or 0), most


def _pools_by_mean(folder: Path) -> bool:
    """What sentence-transformers noted; a plain encoder pools its first token."""
    note = folder / "1_Pooling" / "config.json"
    return note.is_file() and bool(json.loads(note.read_text(encoding="utf-8")).get("pooling_mode_mean_tokens"))


def _image_tower(image: str | TimmImage, embed: int, size: int) -> tuple[TimmModel, TimmImage, ImagePreprocessing]:
    import timm

    name, _, weights = image.partition(":") if isinstance(image, str) else (image.model, "", "")
    _check_timm_name(name)
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


def _check_timm_name(name: Any) -> None:
    """
    Raises:
        InputError: timm has no model of that name; one with a colon would be looked for on a hub or in a folder.
    """
    import timm

    if not isinstance(name, str) or ":" in name or not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:3]
        hint = f": did you mean {', '.join(near)}?" if near else ": see timm.list_models()"
        raise InputError(f"timm has no model '{name}'{hint}")
