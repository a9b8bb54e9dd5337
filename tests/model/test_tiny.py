"""The entrance of `tiny`: the stem, the pooled class token, and embeddings made of n-grams."""

from __future__ import annotations

import pytest
import torch

from cmaclip_fast.nn.tiny import ConvStem, SubwordEmbedding, TinyCLIP, hashed_ngrams

PIECES = ["", "", "", "flower", "flowers", "ox"]
PAD, START, END, FLOWER, FLOWERS, OX = range(6)


def similarity(embedding: SubwordEmbedding, a: int, b: int) -> float:
    vectors = embedding(torch.tensor([[START, a, START, END], [START, b, START, END]]))[:, 1]
    return torch.nn.functional.cosine_similarity(vectors[0], vectors[1], dim=0).item()


def test_like_spellings_share_vectors() -> None:
    embedding = SubwordEmbedding(PIECES, 64, END).eval()
    assert similarity(embedding, FLOWER, FLOWERS) > 0.4 > abs(similarity(embedding, FLOWER, OX))


def test_the_end_token_holds_the_sum_of_the_words_and_nothing_behind_it_matters() -> None:
    embedding = SubwordEmbedding(PIECES, 16, END).eval()
    text = embedding(torch.tensor([[START, FLOWER, OX, END, PAD]]))
    other = embedding(torch.tensor([[START, FLOWER, OX, END, FLOWERS]]))
    bare = embedding(torch.tensor([[START, END, PAD, PAD, PAD]]))
    torch.testing.assert_close(text[:, :4], other[:, :4])
    expected = bare[0, 1] + (text[0, 1] + text[0, 2]) / 2**0.5
    torch.testing.assert_close(text[0, 3], expected)


def test_ngrams_are_of_three_to_five_characters_with_the_ends_marked() -> None:
    assert hashed_ngrams("") == [] and hashed_ngrams("a") == []
    assert len(hashed_ngrams("ox")) == 2  # <ox and ox>
    assert len(set(hashed_ngrams("flowers"))) > len(set(hashed_ngrams("flower"))) > 5


def test_dropout_in_training_alone_and_never_on_special_tokens() -> None:
    embedding = SubwordEmbedding(PIECES, 16, END, dropout=0.5)
    tokens = torch.tensor([[START, FLOWER, END]])
    torch.manual_seed(0)
    first, second = embedding(tokens), embedding(tokens)
    assert not torch.equal(first[:, 1], second[:, 1]) and torch.equal(first[:, 0], second[:, 0])
    embedding.eval()
    assert torch.equal(embedding(tokens), embedding(tokens))


def test_stem_and_positions_take_other_sizes() -> None:
    assert ConvStem(24)(torch.randn(2, 3, 48, 32)).shape == (2, 24, 3, 2)
    clip = TinyCLIP(96, 8, PIECES, END)
    torch.testing.assert_close(clip.visual._positions(6, 6), clip.visual.positional_embedding)
    smaller = clip.visual._positions(4, 4)
    assert smaller.shape == (17, 128)
    torch.testing.assert_close(smaller[0], clip.visual.positional_embedding[0])
    assert clip.visual._embeds(torch.randn(1, 3, 64, 64)).shape == (1, 17, 128)


def test_image_size_is_a_multiple_of_the_stride() -> None:
    with pytest.raises(ValueError, match="multiple of 16"):
        TinyCLIP(50, 8, PIECES, END)
