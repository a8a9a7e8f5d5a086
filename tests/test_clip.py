"""The frozen CLIP is open_clip's, its small vocabulary and its files are sound."""

import open_clip
import pytest
import torch

from clip import (
    BUILT_IN,
    FrozenClip,
    fold_batch_norms,
    load_clip,
    load_small,
    new_small,
    save_small,
)
from common.cli import UserError
from data.scenes import all_words, make_scene
from training.small_clip import vocabulary


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return new_small(vocabulary([all_words()]))


@pytest.fixture(scope="module")
def large():
    """A ViT of open_clip with its whole vocabulary, randomly initialized."""
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(image_size=32, layers=8, width=64, head_width=32, patch_size=16),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2),
    )
    return FrozenClip(model, "test")


def test_text_and_images_are_encoded_as_open_clip_does(large):
    captions = ["a small red circle", "two dogs, playing in the snow 🐕"]
    ids = large.tokenize(captions)
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(captions))
    text = large.encode_text(ids)
    torch.testing.assert_close(text.embedding, large.model.encode_text(ids, normalize=True))
    assert text.tokens.shape == (2, 77, 32) and torch.equal(
        ids[torch.arange(2), text.eot], torch.tensor([49407, 49407])
    )
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    expected = large.model.encode_image((images - mean) / std)
    torch.testing.assert_close(large.encode_image(images * 2 - 1), expected, rtol=1e-4, atol=1e-5)


def test_it_sees_what_the_towers_of_open_clip_compute_on_the_way(small, large):
    """Four feature maps: the stages of a ResNet, every second of the eight blocks of a ViT without its class token."""
    images, outputs = 2 * torch.rand(2, 3, 16, 16) - 1, []
    visual = large.model.visual
    for block in [*small.model.visual.children()][-5:-1] + [visual.transformer.resblocks[i] for i in (1, 3, 5, 7)]:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    maps = [x for clip in (small, large) for x in clip.see(images)[1]]
    outputs[4:] = [x[:, 1:].transpose(1, 2).unflatten(2, visual.grid_size) for x in outputs[4:]]
    torch.testing.assert_close(maps, outputs)
    for clip, seen in ((small, maps[:4]), (large, maps[4:])):
        assert clip.map_shapes == tuple((x.shape[1], x.shape[2]) for x in seen)


def test_folded_batch_norms_change_nothing():
    """In float64, for three sizes of images at a time, beside the ResNet as open_clip runs it, size by size."""
    original, folded = (load_small(BUILT_IN["small"]).double() for _ in range(2))
    fold_batch_norms(folded)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.model.modules())
    images = [2 * torch.rand(2, 3, r, r, dtype=torch.float64) - 1 for r in (8, 16, 32)]
    torch.testing.assert_close(folded.encode_image(*images), torch.cat([original.encode_image(x) for x in images]))


def test_the_small_vocabulary_is_the_captions(small):
    captions = [make_scene(i).caption for i in range(300)]
    ids = small.tokenize(captions)
    assert ids.min() > 0  # no unknown word
    eot = len(small.kept_ids)
    assert torch.equal(ids.argmax(1), (ids == eot).int().argmax(1)) and ids.max() == eot
    assert not any(small.unknown_words(caption) for caption in captions)
    assert small.unknown_words("A Large mauve circle on a gray dragon") == ["mauve", "dragon"]
    assert len(ids.unique(dim=0)) == len(set(captions))


def test_any_text_is_safe(small, large):
    for clip in (small, large):
        texts = ["", "🐉🐉", "word " * 10_000, "a <end_of_text> b", "\0", "é" * 300]
        ids = clip.tokenize(texts)
        assert ids.shape == (6, clip.context_length)
        assert ((ids == ids.max()).sum(1) == 1).all()  # one end of text each
        assert clip.encode_text(ids).tokens.isfinite().all()
        assert clip.num_tokens_cut("word " * 10_000) == 10_002 - clip.context_length
        assert clip.num_tokens_cut("a red circle") == 0


def test_it_never_learns_nor_leaves_eval_mode(small):
    small.train()
    assert not any(module.training for module in small.modules())
    assert not any(p.requires_grad for p in small.parameters())


def test_a_small_clip_survives_its_file(small, tmp_path):
    save_small(small, tmp_path / "clip.safetensors")
    again = load_clip(str(tmp_path / "clip.safetensors"))
    ids = small.tokenize(["a large cyan star"])
    assert torch.equal(again.encode_text(ids).tokens, small.encode_text(ids).tokens)
    assert again.kept_ids == small.kept_ids


@pytest.mark.parametrize(
    "spec", ["nonsense", "ViT-L-14:openai", "ViT-B-32:no-such-weights", "/missing/clip.safetensors"]
)
def test_a_clip_that_cannot_be_had_is_one_clear_line(spec):
    with pytest.raises(UserError, match="--clip") as caught:
        load_clip(spec)
    assert "\n" not in str(caught.value)


def test_weights_that_need_a_network_are_one_clear_line(monkeypatch):
    def offline(*args, **kwargs):
        raise RuntimeError("Failed to download file\nand more")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match=r"pass the file as --clip ViT-L-14-quickgelu:PATH"):
        load_clip("ViT-L-14-quickgelu:openai")


def test_a_foreign_file_is_refused(tmp_path):
    (tmp_path / "clip.safetensors").write_bytes(b"not a model")
    with pytest.raises(UserError, match="damaged"):
        load_clip(str(tmp_path / "clip.safetensors"))
