"""The text encoders and CLIP compute what their authors' code computes; their files are checked."""

import copy
from unittest.mock import Mock

import open_clip
import pytest
import torch

from clip import (
    BUILT_IN,
    ClipText,
    MiniLM,
    fold_batch_norms,
    from_open_clip,
    load_clip,
    load_minilm,
    load_small,
    load_text,
    new_small,
    save_small,
)
from common.cli import UserError


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return new_small(load_minilm())


@pytest.fixture(scope="module")
def model():
    """A ViT of open_clip with its whole vocabulary and random weights."""
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(image_size=32, layers=8, width=64, head_width=32, patch_size=16),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2),
    )


@pytest.fixture(scope="module")
def large(model):
    return from_open_clip(model, "test")


def test_minilm_gives_the_similarities_of_its_model_card():
    """https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2: 0.695 and 0.257 to a happy person."""
    sentences = ["That is a happy person", "That is a happy dog", "Today is a sunny day"]
    first, *others = load_minilm().read(sentences).embedding
    assert [round(float(first @ other), 3) for other in others] == [0.695, 0.257]


def test_minilm_reads_a_caption_the_same_in_any_company():
    """Bit-identical, so that a resumed run, whose cache is empty, equals an uninterrupted one."""
    encoder, captions = load_minilm(), ["a slice of pizza with cheese and olives", "a red heart", "a cat"]
    encoder.cache.clear()
    alone = encoder.read(["a red heart"])
    encoder.cache.clear()
    with torch.autocast("cpu", torch.bfloat16):
        together = encoder.read(captions)
    cached = encoder.read(["a red heart"])
    for ours, others, again in zip(alone, together, cached, strict=True):
        assert torch.equal(ours[0], others[1]) and torch.equal(ours, again)
    in_a_batch = encoder.encode(encoder.tokenize(captions))
    torch.testing.assert_close(in_a_batch.tokens, together.tokens, atol=2e-3, rtol=1e-3)


def test_the_last_token_of_minilm_is_the_embedding_and_the_padding_is_zero():
    text = load_minilm().read(["a red heart", "two dogs playing in the snow"])
    last = torch.nn.functional.normalize(text.tokens[torch.arange(2), text.eot], dim=-1)
    torch.testing.assert_close(last, text.embedding, atol=1e-3, rtol=0)
    end = text.eot[0] + 1
    assert not text.tokens[0, end:].any()
    torch.testing.assert_close(text.tokens[0, :end].square().mean(-1).sqrt(), torch.ones(end), atol=1e-3, rtol=0)


def test_text_and_images_are_encoded_as_open_clip_does(model, large):
    captions = ["a small red circle", "two dogs, playing in the snow 🐕"]
    ids, text = large.tokenize(captions), large.read(captions)
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(captions))
    torch.testing.assert_close(text.embedding, model.encode_text(ids, normalize=True))
    assert text.tokens.shape == (2, 77, 32) and ids[torch.arange(2), text.eot].tolist() == [49407] * 2
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    expected = model.encode_image((images - mean) / std)
    torch.testing.assert_close(large.encode_image(images * 2 - 1), expected, rtol=1e-4, atol=1e-5)


def test_the_feature_maps_are_outputs_of_open_clips_blocks(small, large):
    """Four: the stages of a ResNet, and every second of a ViT's eight blocks without its class token."""
    images, outputs = 2 * torch.rand(2, 3, 16, 16) - 1, []
    visual = large.visual
    for block in [*small.visual.children()][-5:-1] + [visual.transformer.resblocks[i] for i in (1, 3, 5, 7)]:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    maps = [x for clip in (small, large) for x in clip.see(images)[1]]
    outputs[4:] = [x[:, 1:].transpose(1, 2).unflatten(2, visual.grid_size) for x in outputs[4:]]
    torch.testing.assert_close(maps, outputs)
    for clip, seen in ((small, maps[:4]), (large, maps[4:])):
        assert clip.map_shapes() == tuple((x.shape[1], x.shape[2]) for x in seen)


def test_folded_batch_norms_change_nothing():
    """In float64, with images of three sizes in one call, against open_clip's ResNet size by size."""
    original, folded = (load_small(BUILT_IN["emoji"]) for _ in range(2))
    for clip in (original, folded):
        clip.visual.double()
        clip.mean, clip.std = clip.mean.double(), clip.std.double()
    fold_batch_norms(folded)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.visual.modules())
    images = [2 * torch.rand(2, 3, r, r, dtype=torch.float64) - 1 for r in (8, 16, 32)]
    torch.testing.assert_close(folded.encode_image(*images), torch.cat([original.encode_image(x) for x in images]))


def test_any_text_is_safe(small, large):
    texts = ["🐉🐉", "word " * 100, "a <end_of_text> b [SEP]", "a ＜end_of_text＞ [PAD] b"]
    for clip in (small, large):
        ids, text = clip.tokenize(texts), clip.read(texts)
        assert ids.shape == (4, clip.text.context_length)
        assert text.tokens.isfinite().all() and text.embedding.isfinite().all()
        assert clip.text.num_tokens_cut("word " * 100) == 102 - clip.text.context_length
        assert clip.text.num_tokens_cut("a red circle") == 0
    assert ((ids == ids.max()).sum(1) == 1).all()  # one end of text each
    assert ((small.tokenize(texts) != 0).long().diff() <= 0).all()  # padding only at the end
    assert small.text.unknown("a cat, [UNK]") == [] == large.text.unknown("🍕")
    assert small.text.unknown("a café for 🍕x – красное heart") == ["🍕x", "красное"]


def test_a_small_clip_is_saved_and_named_after_its_weights_and_never_learns(small, tmp_path):
    path, images = tmp_path / "clip.safetensors", torch.rand(2, 3, 32, 32)
    save_small(small, path, {"data": "emoji"})
    again = load_small(path).train()
    assert not any(module.training for module in again.modules())
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again.encode_image(images), small.encode_image(images))
    assert torch.equal(again.read(["a star"]).embedding, small.read(["a star"]).embedding)
    save_small(new_small(MiniLM()), path, {})
    assert load_small(path).name != again.name


def test_a_generator_file_names_its_text_encoder(monkeypatch, model):
    assert isinstance(load_text(MiniLM.name), MiniLM)
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: copy.deepcopy(model))
    text = load_text("ViT-L-14-quickgelu:openai")
    assert isinstance(text, ClipText) and not any(name.startswith("model.visual") for name in text.state_dict())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nonsense", "neither a file"),
        ("ViT-L-14:openai", "give ViT-L-14-quickgelu:openai"),
        ("ViT-L-14-quickgelu:openai", "give the file as ViT-L-14-quickgelu:PATH"),
        (__file__, "is damaged, or not a small CLIP"),
    ],
)
def test_a_clip_that_is_not_available_is_one_clear_line(monkeypatch, spec, message):
    """Without a network."""
    monkeypatch.setattr(open_clip, "create_model", Mock(side_effect=RuntimeError("Failed to download file\nand more")))
    with pytest.raises(UserError, match=message) as caught:
        load_clip(spec)
    assert str(caught.value).startswith(spec) and "\n" not in str(caught.value)
