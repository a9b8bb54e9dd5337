"""Round trips, truncation, and vocabularies that are the same in every process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import open_clip
import pytest
import torch
from tokenizers import Tokenizer as Engine

from cmaclip_fast.data import OpenClipTokenizer, Tokenizer, TrainedTokenizer, tokenizer_from_dict
from cmaclip_fast.data.tokenizer import Kind
from cmaclip_fast.errors import InputError

TEXTS = [
    "RedCar_2021 école",
    "a red car",
    "blue car on the HTTPServer",
    "Éléphant gris",
    "red elephant",
    None,
    "school",
]


def _tokenizers() -> list[Tokenizer]:
    return [
        OpenClipTokenizer("ViT-B-32", 12),
        TrainedTokenizer.train(TEXTS, "bpe", context_length=12, min_frequency=1),
        TrainedTokenizer.train(TEXTS, "word", context_length=12, min_frequency=1),
    ]


@pytest.mark.parametrize("tokenizer", _tokenizers(), ids=["open_clip", "bpe", "word"])
class TestEvery:
    def test_shapes_and_special_tokens(self, tokenizer: Tokenizer) -> None:
        tokens, lengths, truncated = tokenizer.encode(["a red car", None, ""])
        assert tokens.shape == (3, 12) and tokens.dtype == torch.int64 and lengths.dtype == torch.int32
        assert truncated == 0 and lengths[1:].tolist() == [2, 2]
        for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
            assert row[0] == tokenizer.bos and row[length - 1] == tokenizer.eot
            assert row[length:] == [tokenizer.pad] * (12 - length)
        assert int(tokens.max()) < tokenizer.vocab_size

    def test_truncation_keeps_the_end_token(self, tokenizer: Tokenizer) -> None:
        fits, one_more = " ".join(["red"] * 10), " ".join(["red"] * 11)
        tokens, lengths, truncated = tokenizer.encode([fits, one_more, "red " * 500])
        assert truncated == 2 and lengths.tolist() == [12, 12, 12]
        assert tokens[:, -1].tolist() == [tokenizer.eot] * 3
        assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])

    @pytest.mark.tried("table", ends="cut before it is tokenized")
    @pytest.mark.parametrize("text", ["red " * 10**6, " \n" * 10**6 + "red " * 20, "red-" * 10**6])
    def test_a_text_of_megabytes_is_cut_first(
        self, text: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read: list[str] = []
        encode = tokenizer._encode
        monkeypatch.setattr(tokenizer, "_encode", lambda texts: (read.extend(texts), encode(texts))[1])
        tokens, lengths, truncated = tokenizer.encode([text, "red"])
        assert truncated == 1 and max(map(len, read)) <= 32 * 12
        assert torch.equal(tokens[0], encode([text.lstrip()[:200]])[0][0]) and lengths.tolist()[0] == 12

    def test_pieces_spell_the_text(self, tokenizer: Tokenizer) -> None:
        tokens, lengths, _ = tokenizer.encode(["red elephant"])
        pieces = tokenizer.decode_tokens(tokens[0, : lengths[0]])
        assert len(pieces) == lengths[0] and pieces[0] == "<start>" and pieces[-1] == "<end>"
        assert "".join(pieces[1:-1]) == "redelephant"

    def test_json_keeps_all(self, tokenizer: Tokenizer) -> None:
        again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
        assert torch.equal(again.encode(TEXTS)[0], tokenizer.encode(TEXTS)[0])
        for name in ("vocab_size", "context_length", "bos", "eot", "pad"):
            assert getattr(again, name) == getattr(tokenizer, name)

    def test_no_texts(self, tokenizer: Tokenizer) -> None:
        tokens, lengths, truncated = tokenizer.encode([])
        assert tokens.shape == (0, 12) and len(lengths) == 0 and truncated == 0


def test_open_clip_tokens_are_open_clips() -> None:
    texts = ["A photo of a cat!", "fluorescent élan 日本", "word " * 100]
    ours = OpenClipTokenizer("ViT-B-32")
    assert ours.context_length == 77 and ours.vocab_size == 49408
    assert torch.equal(ours.encode(texts)[0], open_clip.get_tokenizer("ViT-B-32")(texts))
    assert ours.encode(["!"])[1].tolist() == [3], "'!' has the number of the padding"


def test_open_clip_name() -> None:
    with pytest.raises(InputError, match=r"open_clip has no model 'ViT-B32' .did you mean 'ViT-B-32'"):
        OpenClipTokenizer("ViT-B32")


class _Transformers:
    """Stands for open_clip's wrapper of a transformers tokenizer whose padding is its end token, one byte a token."""

    bos_token_id, cls_token_id, eos_token_id, sep_token_id, pad_token_id = None, 98, None, 99, 99
    context_length = 6

    def __init__(self) -> None:
        self.tokenizer = self

    def __len__(self) -> int:
        return 100

    def __call__(self, texts: list[str], length: int) -> torch.Tensor:
        rows = [[98, *text.encode()[: length - 2], 99] for text in texts]
        return torch.tensor([row + [99] * (length - len(row)) for row in rows])

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"Ġ{number}" for number in ids]


def test_open_clip_names_of_transformers_tokenizers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda *_, **__: _Transformers())
    tokenizer = OpenClipTokenizer("roberta-ViT-B-32")
    tokens, lengths, truncated = tokenizer.encode(["AB", "ABCD", "ABCDE"])
    assert lengths.tolist() == [4, 6, 6] and truncated == 1
    assert tokens.tolist()[0] == [98, 65, 66, 99, 99, 99] and tokens[:, -1].tolist() == [99] * 3
    assert tokenizer.decode_tokens(tokens[0, :2]) == ["98", "65"]
    assert (tokenizer.bos, tokenizer.eot, tokenizer.pad, tokenizer.vocab_size) == (98, 99, 99, 100)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("transformers"), r"needs transformers; install cmaclip_fast\[hf\]"),
        (OSError("offline"), "connect, or fetch"),
    ],
)
def test_open_clip_tokenizer_that_cannot_be_had(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(open_clip, "get_tokenizer", refuse)
    with pytest.raises(InputError, match=message):
        OpenClipTokenizer("roberta-ViT-B-32")


def test_texts_are_normalised() -> None:
    words = TrainedTokenizer.train(TEXTS, "word", min_frequency=1)
    tokens, lengths, _ = words.encode(["RedCar_2021 ÉCOLE, HTTPServer unheard"])
    pieces = words.decode_tokens(tokens[0, : lengths[0]])
    assert pieces == ["<start>", "red", "car", "2021", "ecole", "<unknown>", "http", "server", "<unknown>", "<end>"]


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("Éléphant, İstanbul, Việt", "elephant, istanbul, viet"),
        ("ΆΝΘΗ", "ανθη"),
        ("が パン", "が パン"),
        ("ﾊﾟﾝ", "パン"),
        ("किसान", "किसान"),
        ("বাংলা", "বাংলা"),
        ("น้ำ", "น้\u0e4d\u0e32"),  # the compatibility form of U+0E33 is two code points
        ("한국", "한국"),
        ("Йод", "йод"),
    ],
)
def test_only_accents_are_stripped(text: str, normal: str) -> None:
    tokenizer = TrainedTokenizer.train([text])
    normalizer = Engine.from_str(tokenizer.to_dict()["tokenizer"]).normalizer
    assert normalizer.normalize_str(text) == normal


def test_pieces_of_every_script() -> None:
    texts = ["火事 消防車", "กังหันลม ลม", "किसान माली", "농장 주인", "пожар", "MZ, Flagge", "خانه"]
    tokenizer = TrainedTokenizer.train(texts, min_frequency=1)
    tokens, lengths, _ = tokenizer.encode(texts)
    for row, length, text in zip(tokens, lengths, texts, strict=True):
        spelt = "".join(tokenizer.decode_tokens(row[1 : length - 1]))
        assert spelt == text.replace(" ", "").lower() and "<unknown>" not in spelt


def test_vocabulary_has_its_bounds() -> None:
    assert TrainedTokenizer.train(TEXTS, "word", min_frequency=2).vocab_size < 10
    assert TrainedTokenizer.train(TEXTS, "bpe", vocab_size=40, min_frequency=1).vocab_size == 40


def _vocabularies() -> str:
    texts = [f"{a}{b} {b}{c}" for a in ("ka", "lo", "mi") for b in ("ru", "ta", "ne", "so") for c in ("x", "yy", "zé")]
    kinds: tuple[Kind, ...] = get_args(Kind)
    return json.dumps([TrainedTokenizer.train(texts, kind, vocab_size=60).to_dict() for kind in kinds])


def test_training_is_the_same_in_every_process() -> None:
    program = "import test_tokenizer; print(test_tokenizer._vocabularies())"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == _vocabularies()


def test_wrong_settings() -> None:
    with pytest.raises(InputError, match="cannot be trained without texts"):
        TrainedTokenizer.train([None, ""])
    with pytest.raises(ValueError, match="use one of bpe, word"):
        TrainedTokenizer.train(TEXTS, "unigram")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="context_length 2 has no room"):
        TrainedTokenizer.train(TEXTS, context_length=2)
    with pytest.raises(InputError, match="tokenizer type 'other' is unknown"):
        tokenizer_from_dict({"type": "other"})
