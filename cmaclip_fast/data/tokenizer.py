"""Texts to tokens: open_clip's tokenizers, or a small vocabulary trained on the data and stored with the model."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, get_args

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer, get_clean_fn
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Engine
from torch import Tensor

from cmaclip_fast.data.files import near
from cmaclip_fast.errors import InputError
from cmaclip_fast.untrusted import first_problem

Kind = Literal["bpe", "word"]
SpecialToken = Literal["bos_token", "eos_token", "sep_token", "cls_token", "pad_token", "unk_token", "mask_token"]

MAX_CONTEXT = 4096
"""The longest context, in tokens, that a tower may have."""

CHARACTERS_PER_TOKEN = 32
"""A text is cut after so many characters for each token of the context, far more than a token stands for on average.

Tokenizers read the whole of a text before they cut it, and take the square of the length of a word.
"""


class TrainedState(BaseModel):
    """A `TrainedTokenizer` in an artefact."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["trained"] = "trained"
    context_length: int = Field(ge=3, le=MAX_CONTEXT)
    tokenizer: str


class OpenClipState(BaseModel):
    """An `OpenClipTokenizer` in an artefact: all but CLIP's own vocabulary, which open_clip brings.

    Attributes:
        clean, reduction_mask, strip_sep_token, mode: as open_clip's tokenizers take them.
        vocabulary: the `tokenizer.json` of a Hugging Face tokenizer inside open_clip; None for CLIP's own.
        special: its special tokens, by transformers' names for them.
        padding_side, truncation_side: as transformers has them.
    """

    model_config = ConfigDict(extra="forbid")

    type: Literal["open_clip"] = "open_clip"
    context_length: int = Field(ge=3, le=MAX_CONTEXT)
    clean: Literal["lower", "whitespace", "canonicalize"]
    reduction_mask: Literal["", "simple", "random", "shuffle", "syntax"] = ""
    strip_sep_token: bool = False
    mode: Literal["", "clips"] = ""
    vocabulary: str | None = None
    special: dict[SpecialToken, str] = {}
    padding_side: Literal["left", "right"] = "right"
    truncation_side: Literal["left", "right"] = "right"


class Tokenizer(ABC):
    """Texts to padded tokens with a start and an end token, and back to pieces that can be read.

    Attributes:
        context_length: the most tokens of a text, start and end token counted.
        vocab_size: tokens are below this.
        bos, eot, pad: the start, end and padding token.
    """

    context_length: int
    vocab_size: int
    bos: int
    eot: int
    pad: int

    def encode(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor, int]:
        """Tokens `[B, context_length]` int64, padded on the right; lengths `[B]` int32; how many texts were too long.

        A text that is too long loses its tail and keeps its end token. An absent text is a start and an end token.
        """
        given = [text or "" for text in texts]
        if not given:
            return torch.zeros(0, self.context_length, dtype=torch.int64), torch.zeros(0, dtype=torch.int32), 0
        read = [readable_part(text, self.context_length) for text in given]
        tokens, lengths, too_long = self._encode(read)
        cut = torch.tensor([len(part) < len(text) for part, text in zip(read, given, strict=True)])
        return tokens, lengths, int((too_long | cut).sum())

    @abstractmethod
    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """As `encode`, of at least one text; the last is `[B]` bool, which texts were too long."""

    @abstractmethod
    def decode_tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        """For each token the piece of text that it stands for."""

    def pieces(self) -> list[str]:
        """What every token stands for, in order; empty for the special ones."""
        special = {self.bos, self.eot, self.pad}
        names = self.decode_tokens(range(self.vocab_size))
        return ["" if token in special else name for token, name in enumerate(names)]

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All that `tokenizer_from_dict` needs, as JSON values."""


def readable_part(text: str, context_length: int) -> str:
    """The beginning of a text that is tokenized (see `CHARACTERS_PER_TOKEN`); the whole of one that is not too long."""
    most = CHARACTERS_PER_TOKEN * context_length
    return text if len(text) <= most else text.lstrip()[:most]


def tokenizer_from_dict(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `to_dict` describes.

    Raises:
        InputError: the type is unknown, or a field is missing, unknown or damaged.
    """
    known: dict[str, type[OpenClipTokenizer] | type[TrainedTokenizer]] = {
        "open_clip": OpenClipTokenizer,
        "trained": TrainedTokenizer,
    }
    if str(state.get("type")) not in known:
        raise InputError(
            f"tokenizer type '{state.get('type')}' is unknown; use a version of cmaclip_fast that knows it"
        )
    return known[state["type"]].from_dict(state)


State = TypeVar("State", bound=BaseModel)


def checked_state(kind: type[State], state: dict[str, Any]) -> State:
    """The description of a tokenizer in an artefact, checked.

    Raises:
        InputError: a field is missing, unknown or of a wrong type.
    """
    try:
        return kind.model_validate(state)
    except ValidationError as error:
        raise InputError(f"tokenizer, {first_problem(error)}") from None


def engine_from(content: str) -> Engine:
    """A Hugging Face tokenizer from the text of its `tokenizer.json`; it neither pads nor truncates.

    Raises:
        InputError: the text is none.
    """
    try:
        engine = Engine.from_str(content)
        engine.no_padding()
        engine.no_truncation()
        tokens = engine.get_vocab().values()
    except BaseException as error:  # tokenizers raises a bare Exception, and a panic of Rust is a BaseException
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise InputError(
            f"field 'tokenizer': no tokenizer of Hugging Face's ({' '.join(str(error).split())[:200]})"
        ) from None
    if not tokens or max(tokens) >= 2 * len(tokens) + 1000:
        raise InputError("field 'tokenizer': its tokens have numbers far beyond their count")
    return engine


class OpenClipTokenizer(Tokenizer):
    """The tokenizer of any open_clip model, by the model's name.

    Raises:
        InputError: an unknown name, or a tokenizer that needs a library which is not installed.
    """

    def __init__(self, name: str, context_length: int | None = None) -> None:
        if ":" not in name and name not in open_clip.list_models():
            raise InputError(f"open_clip has no model '{name}'{near(name, open_clip.list_models())}")
        try:
            self._tokenizer = open_clip.get_tokenizer(name, context_length=context_length)
        except ImportError as error:
            raise InputError(f"the tokenizer of '{name}' needs transformers; install cmaclip_fast[hf]") from error
        except OSError as error:
            cause = " ".join(str(error).split())[:200]
            raise InputError(
                f"the tokenizer of '{name}' cannot be loaded ({cause}); connect, or fetch it once"
            ) from error
        config = open_clip.get_model_config(name) or {}
        self._options: dict[str, Any] = config.get("text_cfg", {}).get("tokenizer_kwargs") or {}
        self._use(self._tokenizer)

    def _use(self, tokenizer: Any) -> None:
        """Takes one of open_clip's tokenizers."""
        self._tokenizer = tokenizer
        self.context_length = int(tokenizer.context_length)
        if isinstance(self._tokenizer, SimpleTokenizer):
            self.bos, self.eot, self.pad = self._tokenizer.sot_token_id, self._tokenizer.eot_token_id, 0
            self.vocab_size = self._tokenizer.vocab_size
        else:
            inner = self._tokenizer.tokenizer
            self.bos = _first(inner.bos_token_id, inner.cls_token_id, inner.pad_token_id)
            self.eot = _first(inner.eos_token_id, inner.sep_token_id, inner.pad_token_id)
            self.pad = _first(inner.pad_token_id)
            self.vocab_size = len(inner)

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        tokens = self._tokenizer(texts, self.context_length + 1)
        too_long = self._lengths(tokens) > self.context_length
        tokens = tokens[:, : self.context_length].clone()
        if long := too_long.nonzero().flatten().tolist():
            tokens[long] = self._tokenizer([texts[i] for i in long], self.context_length)
        return tokens, self._lengths(tokens), too_long

    def decode_tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        numbers = [int(i) for i in ids]
        if not isinstance(self._tokenizer, SimpleTokenizer):
            pieces = self._tokenizer.tokenizer.convert_ids_to_tokens(numbers)
            return [piece.replace("▁", "").replace("Ġ", "") for piece in pieces]
        names = {self.bos: "<start>", self.eot: "<end>"}
        return [names.get(number) or self._tokenizer.decode([number]).strip() for number in numbers]

    def to_dict(self) -> dict[str, Any]:
        kept = {name: self._options[name] for name in ("clean", "reduction_mask") if name in self._options}
        if isinstance(self._tokenizer, SimpleTokenizer):
            state = OpenClipState(context_length=self.context_length, **{"clean": "lower", **kept})
            return state.model_dump(exclude_defaults=True) | {"type": state.type}
        inner = self._tokenizer.tokenizer
        state = OpenClipState(
            context_length=self.context_length,
            **{"clean": "whitespace", **kept},
            strip_sep_token=self._tokenizer.strip_sep_token,
            mode=self._tokenizer.tokenizer_mode,
            vocabulary=inner.backend_tokenizer.to_str(),
            special={n: str(getattr(inner, n)) for n in get_args(SpecialToken) if getattr(inner, n) is not None},
            padding_side=inner.padding_side,
            truncation_side=inner.truncation_side,
        )
        return state.model_dump()

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> OpenClipTokenizer:
        read = checked_state(OpenClipState, state)
        found = cls.__new__(cls)
        found._options = {"clean": read.clean, "reduction_mask": read.reduction_mask}
        if read.vocabulary is None:
            found._use(SimpleTokenizer(context_length=read.context_length, **found._options))
        else:
            found._use(_StoredTokenizer(read, engine_from(read.vocabulary)))
        return found

    def _lengths(self, tokens: Tensor) -> Tensor:
        """The place of the end token plus one; where a tokenizer writes none, the tokens that are not padding."""
        is_end = tokens == self.eot
        is_end[:, 0] = False
        end = is_end.int().argmax(dim=1) + 1
        return torch.where(is_end.any(dim=1), end, (tokens != self.pad).sum(dim=1)).int()


class _StoredTokenizer(HFTokenizer):
    """open_clip's wrapper of a Hugging Face tokenizer, around one that was kept in an artefact."""

    def __init__(self, state: OpenClipState, engine: Engine) -> None:
        try:
            from transformers import PreTrainedTokenizerFast
        except ImportError:
            raise InputError("this tokenizer needs transformers: pip install 'cmaclip_fast[hf]'") from None
        if "pad_token" not in state.special:
            raise InputError("field 'tokenizer.special': has no 'pad_token'")
        self.tokenizer_mode = state.mode
        self.context_length = state.context_length
        self.clean_fn = get_clean_fn(state.clean)
        self.strip_sep_token = state.strip_sep_token
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=engine,
            padding_side=state.padding_side,
            truncation_side=state.truncation_side,
            **state.special,
        )


class TrainedTokenizer(Tokenizer):
    """A vocabulary learnt from the training texts, for models trained from scratch; made by `train`.

    Texts are split at spaces, punctuation, underscores, digits and changes of case within a word, lowercased, and
    Latin and Greek letters stripped of accents. Any script will do; what is written without spaces is cut into pieces
    by `bpe` alone. The whole of it is one JSON object.
    """

    _SPECIAL = ("<pad>", "<start>", "<end>", "<unknown>")

    def __init__(self, engine: Engine, context_length: int) -> None:
        if context_length < 3:
            raise ValueError(f"context_length {context_length} has no room for a token between start and end; use 3 up")
        self._engine = engine
        self.context_length = context_length
        self.pad, self.bos, self.eot, self.unknown = range(len(self._SPECIAL))
        self.vocab_size = engine.get_vocab_size()

    @classmethod
    def train(
        cls,
        texts: Iterable[str | None],
        kind: Kind = "bpe",
        vocab_size: int = 4096,
        context_length: int = 32,
        min_frequency: int = 2,
    ) -> TrainedTokenizer:
        """Learns a vocabulary; the same texts give the same one.

        Args:
            texts: absent ones are passed over.
            kind: `bpe` cuts rare words into pieces; `word` makes them unknown.
            vocab_size: at most this many tokens, the four special ones counted.
            min_frequency: words (`word`) or pairs (`bpe`) seen less often are left out.

        Raises:
            InputError: there is no text to learn from.
        """
        if kind not in get_args(Kind):
            raise ValueError(f"kind '{kind}' is unknown; use one of {', '.join(get_args(Kind))}")
        present = [readable_part(text, context_length) for text in texts if text]
        if not present:
            raise InputError("a tokenizer cannot be trained without texts; name the column of text, or use open_clip's")
        options: dict[str, Any] = {
            "vocab_size": vocab_size,
            "min_frequency": min_frequency,
            "special_tokens": list(cls._SPECIAL),
            "show_progress": False,
        }
        if kind == "bpe":
            engine = Engine(models.BPE(unk_token="<unknown>"))
            # end_of_word_suffix would number tokens in the order of a hash map, another one in every process
            trainer: Any = trainers.BpeTrainer(**options)
        else:
            engine = Engine(models.WordLevel(unk_token="<unknown>"))
            trainer = trainers.WordLevelTrainer(**options)
        _split_words(engine)
        engine.train_from_iterator(present, trainer)
        return cls(engine, context_length)

    def _encode(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        room = self.context_length - 2
        inner = [encoding.ids for encoding in self._engine.encode_batch(texts)]
        tokens = torch.full((len(inner), self.context_length), self.pad, dtype=torch.int64)
        for row, ids in enumerate(inner):
            whole = [self.bos, *ids[:room], self.eot]
            tokens[row, : len(whole)] = torch.tensor(whole)
        lengths = torch.tensor([min(len(ids), room) + 2 for ids in inner], dtype=torch.int32)
        return tokens, lengths, torch.tensor([len(ids) > room for ids in inner])

    def decode_tokens(self, ids: Sequence[int] | Tensor) -> list[str]:
        return [(self._engine.id_to_token(int(i)) or "").replace("▁", "") for i in ids]

    def to_dict(self) -> dict[str, Any]:
        return {"type": "trained", "context_length": self.context_length, "tokenizer": self._engine.to_str()}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> TrainedTokenizer:
        read = checked_state(TrainedState, state)
        engine = engine_from(read.tokenizer)
        plain = Engine(engine.model)
        _split_words(plain)
        ours, theirs = json.loads(plain.to_str()), json.loads(engine.to_str())
        # how words are split and spelt is ours to say: a pattern of a stranger's may take for ever
        other = [k for k in ours if k != "added_tokens" and ours[k] != theirs[k]]
        if not isinstance(engine.model, (models.BPE, models.WordLevel)) or other:
            raise InputError(f"field 'tokenizer.tokenizer': is not one that this version trains ({', '.join(other)})")
        vocabulary = engine.get_vocab()
        special = [vocabulary.get(name) for name in cls._SPECIAL]
        if special != list(range(len(special))) or max(vocabulary.values()) >= len(vocabulary):
            raise InputError("field 'tokenizer.tokenizer': its tokens are not numbered from the special ones on")
        if engine.model.unk_token != "<unknown>" or getattr(engine.model, "dropout", None):
            raise InputError("field 'tokenizer.tokenizer': has no token for what is unknown, or drops some")
        return cls(engine, read.context_length)


def _split_words(engine: Engine) -> None:
    splits = [pre_tokenizers.Metaspace(prepend_scheme="always")] if isinstance(engine.model, models.BPE) else []
    engine.normalizer = _normalizer()
    engine.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(), *splits])


def _normalizer() -> normalizers.Normalizer:
    # only of Latin and Greek: in other scripts marks are vowels, or make another consonant
    accents = r"(?<=[\p{Latin}\p{Greek}])\p{Mn}+"
    change_of_case = r"(?<=[\p{Ll}\p{N}])(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})"
    return normalizers.Sequence(
        [
            normalizers.NFC(),  # 'É' must be one capital before changes of case are looked for
            normalizers.Replace(Regex(change_of_case), " "),
            normalizers.Replace("_", " "),
            normalizers.NFKD(),
            normalizers.Replace(Regex(accents), ""),
            normalizers.Lowercase(),
            normalizers.NFC(),
        ]
    )


def _first(*ids: int | None) -> int:
    return next(number for number in ids if number is not None)
