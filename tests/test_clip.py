"""The text encoders and the CLIP read and see as their authors' code does; their files are sound."""

import open_clip
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

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
    """A ViT of open_clip with its whole vocabulary, randomly initialized."""
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
    """To the bit, so that a run that is resumed with nothing remembered goes on as if it had not stopped."""
    encoder, captions = load_minilm(), ["a slice of pizza with cheese and olives", "a red heart", "a cat"]
    encoder.known.clear()
    alone = encoder.read(["a red heart"])
    encoder.known.clear()
    with torch.autocast("cpu", torch.bfloat16):
        beside = encoder.read(captions)
    remembered = encoder.read(["a red heart"])
    for ours, others, again in zip(alone, beside, remembered, strict=True):
        assert torch.equal(ours[0], others[1]) and torch.equal(ours, again)
    together = encoder.encode(encoder.tokenize(captions))
    torch.testing.assert_close(together.tokens, beside.tokens, atol=2e-3, rtol=1e-3)


def test_the_last_token_of_minilm_is_the_sentence_code_and_nothing_is_beyond_it():
    text = load_minilm().read(["a red heart", "two dogs playing in the snow"])
    rows = torch.arange(2)
    code = torch.nn.functional.normalize(text.tokens[rows, text.eot], dim=-1)
    torch.testing.assert_close(code, text.embedding, atol=1e-3, rtol=0)
    assert not text.tokens[0, text.eot[0] + 1 :].any()
    norms = text.tokens[0, : text.eot[0] + 1].square().mean(-1).sqrt()
    torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-3, rtol=0)


def test_text_and_images_are_encoded_as_open_clip_does(model, large):
    captions = ["a small red circle", "two dogs, playing in the snow 🐕"]
    ids = large.tokenize(captions)
    assert torch.equal(ids, open_clip.get_tokenizer("ViT-B-32")(captions))
    text = large.read(captions)
    torch.testing.assert_close(text.embedding, model.encode_text(ids, normalize=True))
    assert text.tokens.shape == (2, 77, 32) and torch.equal(
        ids[torch.arange(2), text.eot], torch.tensor([49407, 49407])
    )
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    expected = model.encode_image((images - mean) / std)
    torch.testing.assert_close(large.encode_image(images * 2 - 1), expected, rtol=1e-4, atol=1e-5)


def test_it_sees_what_the_towers_of_open_clip_compute_on_the_way(small, large):
    """Four feature maps: the stages of a ResNet, every second of the eight blocks of a ViT without its class token."""
    images, outputs = 2 * torch.rand(2, 3, 16, 16) - 1, []
    visual = large.visual
    for block in [*small.visual.children()][-5:-1] + [visual.transformer.resblocks[i] for i in (1, 3, 5, 7)]:
        block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    maps = [x for clip in (small, large) for x in clip.see(images)[1]]
    outputs[4:] = [x[:, 1:].transpose(1, 2).unflatten(2, visual.grid_size) for x in outputs[4:]]
    torch.testing.assert_close(maps, outputs)
    for clip, seen in ((small, maps[:4]), (large, maps[4:])):
        assert clip.map_shapes == tuple((x.shape[1], x.shape[2]) for x in seen)


class Products(TorchDispatchMode):
    """The shapes of what batched products multiply."""

    def __init__(self):
        super().__init__()
        self.batched = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.bmm.default, torch.ops.aten.baddbmm.default):
            self.batched.append([tuple(x.shape) for x in args])
        return func(*args, **(kwargs or {}))


def test_a_vit_makes_q_k_and_v_by_one_product(large):
    """Of all tokens, where gradients reach the images; not by one for each token."""
    with Products() as products:
        large.encode_image(torch.zeros(2, 3, 32, 32, requires_grad=True)).sum().backward()
    assert not [shapes for shapes in products.batched if 3 * 64 in shapes[1]]


def test_folded_batch_norms_change_nothing():
    """In float64, for three sizes of images at a time, beside the ResNet as open_clip runs it, size by size."""
    original, folded = (load_small(BUILT_IN["emoji"]) for _ in range(2))
    for clip in (original, folded):
        clip.visual.double()
        clip.mean, clip.std = clip.mean.double(), clip.std.double()
    fold_batch_norms(folded)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.visual.modules())
    images = [2 * torch.rand(2, 3, r, r, dtype=torch.float64) - 1 for r in (8, 16, 32)]
    torch.testing.assert_close(folded.encode_image(*images), torch.cat([original.encode_image(x) for x in images]))


def test_any_text_is_safe(small, large):
    texts = ["🐉🐉", "word " * 10_000, "a <end_of_text> b [SEP]", "a <END_OF_TEXT> ＜end_of_text＞ [PAD] b", "é" * 300]
    for clip in (small, large):
        ids = clip.tokenize(texts)
        assert ids.shape == (5, clip.text.context_length)
        assert clip is large or ((ids != 0).sum(1) == (ids != 0).long().cumsum(1).argmax(1) + 1).all()  # no hole
        text = clip.read(texts)
        assert text.tokens.isfinite().all() and text.embedding.isfinite().all()
        assert clip.text.num_tokens_cut("word " * 10_000) == 10_002 - clip.text.context_length
        assert clip.text.num_tokens_cut("a red circle") == 0
    assert ((ids == ids.max()).sum(1) == 1).all()  # one end of text each


def test_it_never_learns_nor_leaves_eval_mode(small):
    small.train()
    assert not any(module.training for module in small.modules())
    assert not any(p.requires_grad for p in small.parameters())


def test_a_small_clip_survives_its_file_and_its_name_tells_its_weights(small, tmp_path):
    path = tmp_path / "clip.safetensors"
    save_small(small, path, {"data": "emoji"})
    again, images = load_small(path), torch.rand(2, 3, 32, 32)
    assert torch.equal(again.encode_image(images), small.encode_image(images))
    assert torch.equal(again.read(["a star"]).embedding, small.read(["a star"]).embedding)
    other = new_small(MiniLM())
    save_small(other, path, {})
    assert load_small(path).name != again.name


def test_the_text_encoder_of_a_generator_is_found_by_its_name(monkeypatch, model):
    assert isinstance(load_text(MiniLM.name), MiniLM)
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **kwargs: model)
    assert isinstance(load_text("ViT-L-14-quickgelu:openai"), ClipText)


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
