"""What each paper states of its own equations."""

from __future__ import annotations

import pytest
import torch

from cmaclip_fast import InputError
from cmaclip_fast.bench.loops import heads_apart
from cmaclip_fast.systems.embracenet import EmbraceNet
from cmaclip_fast.systems.kaleidobert import JIGSAW
from cmaclip_fast.systems.one_stream import mismatched
from cmaclip_fast.systems.stream import mask_token, mask_words, pool_patches
from cmaclip_fast.types import IMAGE, TEXT

from .conftest import TASKS, make, make_batch


class TestEmbraceNet:
    """arXiv 1904.09078, section 3."""

    def test_each_feature_comes_from_one_modality_that_is_there(self) -> None:
        present = torch.tensor([[True, True], [True, False], [False, True], [False, False]])
        probability = EmbraceNet.probabilities(present)
        assert probability.tolist() == [[0.5, 0.5], [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
        drawn = EmbraceNet.draw(probability, 4000)
        assert drawn.sum(1)[:3].eq(1).all() and drawn[3].eq(0).all()
        assert drawn[1, TEXT].all() and drawn[2, IMAGE].all()
        assert abs(drawn[0, TEXT].mean() - 0.5) < 0.05

    def test_the_fused_vector_in_test_is_the_mean_over_draws(self) -> None:
        system, batch = make("embracenet"), make_batch()
        drawing = make("embracenet", at_test="draw")
        seen: list[torch.Tensor] = []
        for s in (system, drawing):
            s.heads.register_forward_hook(lambda module, given, out: seen.append(given[0]))
        with torch.inference_mode():
            system(batch)
            for _ in range(60):
                drawing(batch)
        mean = torch.stack(seen[1:]).mean(0)
        assert (mean - seen[0]).abs().mean() < 0.2 * seen[0].abs().mean()
        assert (seen[1] - seen[0]).abs().mean() > 0.4 * seen[0].abs().mean()

    def test_modality_dropout_leaves_one_side(self) -> None:
        system = make("embracenet", modality_dropout=0.5)
        present = torch.ones(2000, 2, dtype=torch.bool)
        present[:100, IMAGE] = False
        left = system.drop_modalities(present)
        assert left.any(1).all() and torch.equal(left[:100], present[:100])
        shares = 1 - left[100:].float().mean(0)
        assert (shares - 0.25).abs().max() < 0.05


class TestCoCa:
    """arXiv 2205.01917, section 3."""

    def test_no_word_sees_a_later_one(self) -> None:
        system, batch = make("coca"), make_batch()
        with torch.inference_mode():
            encoded = system.encode(batch)
            seen, _ = system.pool(encoded.image[:, 1:])
            before = system.decode(seen, encoded.text)
            tokens = batch.tokens.clone()
            tokens[0, 3] = tokens[0, 2]
            changed = make_batch()
            changed.tokens = tokens
            after = system.decode(seen, system.encode(changed).text)
        torch.testing.assert_close(before[0, :3], after[0, :3])
        assert (before[0, 3:5] - after[0, 3:5]).abs().max() > 1e-4

    def test_every_word_sees_the_image(self) -> None:
        system, batch = make("coca"), make_batch()
        with torch.inference_mode():
            encoded = system.encode(batch)
            one, other = (
                system.decode(system.pool(x)[0], encoded.text) for x in (encoded.image, encoded.image.flip(0))
            )
        assert ((one - other).abs().amax(2)[0, :4] > 1e-5).all()

    def test_poolers_give_queries_and_one_embedding_in_cascade(self) -> None:
        system = make("coca", queries=5)
        seen, pooled = system.pool(torch.randn(2, 9, 32))
        assert seen.shape == (2, 5, 32) and pooled.shape == (2, 32)
        torch.testing.assert_close(system.contrastive_pooler(seen)[:, 0], pooled)

    def test_it_learns_to_caption(self) -> None:
        system = make("coca", caption_weight=1.0, contrastive_weight=0.0).train()
        texts = ["a long red dress", "short blue coat", "green skirt"]
        batch = make_batch(texts, [True] * 3)
        optimizer = torch.optim.AdamW(system.parameters(), lr=5e-3)
        # without dropout of words the three pictures are soon known by heart
        system.text_tower.text.token_embedding.dropout = 0.0
        for _ in range(60):
            loss = system.extra_losses(batch, system(batch))["caption"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss < 0.05:
                break
        assert system.captions(batch.images) == texts

    def test_captions_stop_at_the_longest_text(self) -> None:
        system = make("coca")
        with torch.no_grad():
            system.decoder.text_projection.zero_()
        (caption,) = system.captions(torch.zeros(1, 3, 32, 32))
        assert isinstance(caption, str)


class TestPerceiverIO:
    """arXiv 2107.14795, section 3."""

    def test_inputs_are_a_set(self) -> None:
        system, batch = make("perceiver-io"), make_batch()
        tokens = torch.randn(20, 32)
        cu = torch.tensor([0, 12, 20], dtype=torch.int32)
        order = torch.cat([torch.randperm(12), 12 + torch.randperm(8)])
        with torch.inference_mode():
            torch.testing.assert_close(system.read_out(tokens[order], cu, 12), system.read_out(tokens, cu, 12))
            assert len(system(batch).logits) == len(TASKS)

    def test_the_cost_of_latents_does_not_grow_with_the_input(self) -> None:
        system = make("perceiver-io", latents=4)
        sizes = []
        system.process.register_forward_hook(lambda module, given, out: sizes.append(len(given[0])))
        with torch.inference_mode():
            for count in (5, 500):
                system.read_out(torch.randn(count, 32), torch.tensor([0, count], dtype=torch.int32), count)
        assert sizes == [4, 4]

    def test_each_task_has_its_query(self) -> None:
        system, batch = make("perceiver-io"), make_batch()
        with torch.inference_mode():
            before = system(batch).logits
            system.queries[0].mul_(-50)
            after = system(batch).logits
        assert not torch.allclose(before["colour"], after["colour"])
        assert torch.equal(before["style/cut"], after["style/cut"])


class TestMMBT:
    """arXiv 1909.02950, section 3.2."""

    def test_each_image_embedding_has_its_own_projection(self) -> None:
        system, batch = make("mmbt", side=2), make_batch()
        assert system.place_projections.shape[0] == 4
        with torch.inference_mode():
            before = system(batch).logits["colour"]
            system.place_projections[3].mul_(-5)
            after = system(batch).logits["colour"]
        assert not torch.allclose(before[:5], after[:5])
        assert torch.equal(before[5], after[5])  # no picture

    def test_pooling_averages_the_grid(self) -> None:
        patches = torch.arange(16.0).view(1, 16, 1)
        assert pool_patches(patches, (4, 4), 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
        assert pool_patches(patches[:, :4], (4, 4), 1).item() == 1.5  # a smaller picture
        assert pool_patches(patches[:, :3], None, 1).item() == 1.0  # no grid


class TestMasking:
    """arXiv 1810.04805, section 3.1."""

    def test_words_are_hidden_and_marks_are_not(self) -> None:
        tokens = torch.arange(3, 23).repeat(2000, 1)
        lengths = torch.full((2000,), 15)
        lengths[0] = 0
        corrupted, chosen = mask_words(tokens, lengths, 0.15, mask=1, vocabulary=1000)
        assert not chosen[0].any() and not chosen[:, 0].any() and not chosen[:, 14:].any()
        assert abs(chosen[1:, 1:14].float().mean() - 0.15) < 0.01
        assert torch.equal(corrupted[~chosen], tokens[~chosen])
        hidden = corrupted[chosen]
        assert abs((hidden == 1).float().mean() - 0.8) < 0.02
        assert abs((hidden == tokens[chosen]).float().mean() - 0.1) < 0.02

    def test_the_mask_token_is_no_word(self) -> None:
        tokenizer = make("one-stream").tokenizer
        assert tokenizer.pieces()[mask_token(tokenizer)] in ("", "<unknown>")

    def test_half_of_the_complete_pairs_are_mismatched(self) -> None:
        complete = torch.ones(1000, dtype=torch.bool)
        complete[::10] = False
        rows = mismatched(complete)
        own = rows == torch.arange(1000)
        assert own[~complete].all() and complete[rows[~own]].all()
        assert abs(own[complete].float().mean() - 0.5) < 0.06
        assert mismatched(torch.tensor([True, False])).tolist() == [0, 1]


class TestOSCAR:
    """arXiv 2004.06165, section 3."""

    def test_tags_are_the_names_of_the_classes_that_the_image_shows(self) -> None:
        system, batch = make("oscar"), make_batch()
        with torch.inference_mode():
            image = system.encode(batch).globals[:, IMAGE]
            tags, classes = system._tags(image)
            found = [head(image).argmax(1) for head in heads_apart(system.auxiliary_heads[IMAGE])]
            assert torch.equal(classes, torch.stack(found, dim=1))
            for k, names in enumerate(TASKS.values()):
                name = names[int(classes[0, k])]
                torch.testing.assert_close(tags[0, k], system._read_names([(k, names.index(name))])[0])

    def test_tags_are_part_of_the_input(self) -> None:
        system, batch = make("oscar"), make_batch()
        seen = []
        system.stream.register_forward_hook(lambda module, given, out: seen.append(given[2].shape[1]))
        with torch.inference_mode():
            system(batch)
            assert seen == [system.encode(batch).image.shape[1] + len(TASKS)]

    def test_it_needs_the_heads_that_find_them(self) -> None:
        with pytest.raises(InputError, match="auxiliary_heads"):
            make("oscar", auxiliary_heads=False)

    @pytest.mark.parametrize(
        ("name", "losses"),
        [
            ("one-stream", {"masked words", "matching", "masked patches"}),
            ("fashionbert", {"masked words", "matching", "masked patches"}),
            ("oscar", {"masked words", "tags or polluted tags", "masked tags"}),
            (
                "kaleidobert",
                {"masked words", "matching", "masked patches", "jigsaw", "camouflage"},
            ),
        ],
    )
    def test_the_losses_of_each_paper(self, name: str, losses: set[str]) -> None:
        system, found = make(name).train(), set()
        batch = make_batch()
        for _ in range(8):
            found |= set(system.extra_losses(batch, system(batch)))
        assert found == losses


class TestKaleidoBERT:
    """arXiv 2103.16110, section 3."""

    def test_five_scales_make_fifty_five_patches(self) -> None:
        system = make("kaleidobert")
        width = system.image_tower.width
        patches = system.kaleido(torch.randn(2, 36, width))
        assert patches.shape == (2, 55, width)
        assert [system.places(scale) for scale in (1, 2, 5)] == [slice(0, 1), slice(1, 5), slice(30, 55)]
        torch.testing.assert_close(patches[:, 0], patches[:, system.places(3)].mean(1))

    def test_of_an_aligned_pair_one_side_is_hidden(self) -> None:
        system = make("kaleidobert", mask=0.45)
        words = torch.ones(400, 6, dtype=torch.bool)
        words[:, 0] = False
        aligned = torch.randint(30, 55, (400, 6))
        aligned[:, 5] = -1
        hide_words, hide_patches = system.guided_masks(aligned, words)
        assert not hide_words[:, 0].any()
        rows, positions = (hide_words & (aligned >= 0)).nonzero(as_tuple=True)
        assert not hide_patches[rows, aligned[rows, positions]].any()
        assert len(rows) and hide_patches.any()
        # a patch is hidden only if some word aligns with it
        for row in range(20):
            assert set(hide_patches[row].nonzero().flatten().tolist()) <= set(aligned[row].tolist())
        assert hide_words[:, 5].float().mean() > hide_words[:, 1:5].float().mean()

    def test_words_align_with_patches_of_the_fine_scales(self) -> None:
        system, batch = make("kaleidobert").train(), make_batch()
        aligned = system(batch).kept[1]
        there = aligned >= 0
        assert aligned[there].min() >= 14 and aligned[there].max() < 55
        complete = batch.present.all(1)
        assert torch.equal(there.sum(1) > 0, complete)
        assert torch.equal(there.sum(1)[complete].int(), batch.text_lengths[complete])

    def test_alignment_runs_each_layer_once_and_without_gradients(self) -> None:
        system, batch = make("kaleidobert", depth=2).train(), make_batch()
        runs: list[int] = []
        first, last = system.stream.attention.layers
        first.norm_attention.register_forward_hook(lambda *_: runs.append(1))
        found = []
        attention_weights = last.attention_weights
        last.attention_weights = lambda *inputs: found.append(attention_weights(*inputs)) or found[-1]
        system(batch)
        assert runs == [1]
        assert not any(weights.requires_grad for weights in found[0])

    def test_the_jigsaw_can_be_undone(self) -> None:
        system = make("kaleidobert")
        pieces = torch.randn(6, 55, 8)
        where = torch.tensor([True] * 5 + [False])
        moved, order = system._shuffle(pieces, where)
        assert order[5] == -1 and torch.equal(moved[5], pieces[5])
        for row in range(5):
            for place, source in enumerate(JIGSAW[int(order[row])]):
                assert torch.equal(moved[row, 1 + place], pieces[row, 1 + source])


class TestZeroShot:
    """arXiv 2103.00020, section 3.1."""

    @torch.inference_mode()
    def test_logits_are_scaled_cosines_with_the_mean_prompt(self) -> None:
        templates = {"colour": ["a {} dress", "something {}"]}
        system = make("clip-zero-shot-image", templates=templates)
        batch = make_batch(["red dress"], [True])
        image, _ = system.contrastive_features(batch)
        for index, name in enumerate(TASKS["colour"]):
            tokens = system.tokenizer.encode([f"a {name} dress", f"something {name}"])[0]
            prompt = torch.nn.functional.normalize(system.encode_text(tokens, normalize=True).mean(0), dim=-1)
            expected = system.logit_scale.exp() * image[0] @ prompt
            torch.testing.assert_close(system(batch).logits["colour"][0, index], expected)

    @torch.inference_mode()
    def test_both_sides_are_averaged(self) -> None:
        batch = make_batch(["red dress"], [True])
        both, text, image = (
            make("clip-zero-shot", use=use)(batch).logits["colour"] for use in ("both", "text", "image")
        )
        torch.testing.assert_close(both, (text + image) / 2)

    def test_no_label_is_learnt_from(self) -> None:
        system = make("clip-zero-shot").train()
        assert not system.uses_labels and not list(getattr(system, "heads", []))

    def test_prompts_follow_the_weights(self) -> None:
        system, batch = make("clip-zero-shot"), make_batch(["red dress"], [True])
        with torch.no_grad():
            before = system(batch).logits["colour"]
            system.train()
            system.text_tower.text.text_projection.mul_(-1)
            system.eval()
            after = system(batch).logits["colour"]
        assert not torch.allclose(before, after)

    def test_templates_that_do_not_fit_are_said(self) -> None:
        with pytest.raises(InputError, match="no task 'hue'"):
            make("clip-zero-shot", templates={"hue": ["a {}"]})
        with pytest.raises(InputError, match="for the class"):
            make("clip-zero-shot", templates={"colour": ["a colour"]})
