"""Evaluation compared with torch-fidelity, open_clip and the definitions; and COCO's format end to end."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import evaluate
from clip import load_clip
from data import coco
from evaluation import extractors, features, metrics
from tests import figures
from tests.conftest import assert_one_line
from upsampler import Upsampler
from weights.generator_file import content, save_generator


@pytest.fixture
def run(run_main, tmp_path, monkeypatch):
    """evaluate.py with arguments → exit status, stdout, stderr without the progress bars."""
    monkeypatch.setattr(extractors, "efficientnet", lambda device: figures.GRID_MEANS)
    common = "--device", "cpu", "--checkpoint", figures.generator_file(), "--clip", "emoji", "--out", tmp_path / "out"

    def run(*arguments):
        status, stdout, stderr = run_main(evaluate.main, *common, *arguments)
        return status, stdout, stderr.split("\r")[-1].strip()

    return run


def write_coco(folder, count=6, split="val2014"):
    """A captions file in COCO's format, two captions an image, and its images, of sizes as photographs have them."""
    (folder / "annotations").mkdir()
    (folder / "val2014").mkdir()
    listed, annotations = [], []
    for i in range(count):
        name = f"COCO_{split}_{i:012d}.jpg"
        figures.picture(i, 64, seed=99).resize((96, 64)).save(folder / "val2014" / name, quality=95)
        listed.append({"id": i, "file_name": name})
        for text in (figures.caption(i, 99), "picture of a " + figures.caption(i, 99)):
            annotations.append({"image_id": i, "caption": text})
    path = folder / "annotations" / f"captions_{split}.json"
    path.write_text(json.dumps({"images": listed, "annotations": annotations}))
    return path


def test_precision_is_of_generated_images_and_recall_of_real_ones():
    """With three neighbours: of five real points 0 … 4 the balls reach from −3 to 7; those of the last ones to 0.6."""
    real, fake = torch.arange(5.0)[:, None], torch.tensor([[-9.0], [0.0], [0.1], [0.2], [0.3], [6.5]])
    near = torch.tensor([[0.0], [0.1], [0.2], [0.3]])
    assert metrics.precision_recall(real, fake) == pytest.approx((5 / 6, 1))
    assert metrics.precision_recall(real, near) == pytest.approx((1, 1 / 5))


def test_clip_score_is_open_clips(tmp_path):
    """The same pictures and captions through a model of open_clip by hand: its transform, its tokenizer, its towers."""
    torch.manual_seed(0)
    weights, vision = tmp_path / "weights.pt", dict(image_size=32, layers=1, width=64, patch_size=16)
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    (tmp_path / "tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(tmp_path / "tiny.json")
    torch.save(open_clip.create_model("tiny").state_dict(), weights)
    pixels, captions = features.to_pixels(figures.images(range(3), 40), 40), [figures.caption(i) for i in range(3)]
    extractor = extractors.load_extractor(f"tiny:{weights}", torch.device("cpu"))
    model, _, transform = open_clip.create_model_and_transforms("tiny", pretrained=str(weights))
    model.eval()
    with torch.no_grad():
        found = metrics.clip_score(extractor.images(pixels), extractor.texts(captions))
        pictures = [transform(Image.fromarray(p.permute(1, 2, 0).numpy())) for p in pixels]
        image = model.encode_image(torch.stack(pictures), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer("tiny")(captions), normalize=True)
    assert found == pytest.approx((image * text).sum(-1).mean().item(), abs=1e-6)


def test_inception_is_read_from_torch_fidelitys_file(tmp_path, monkeypatch):
    """Random weights in a file of the true layout: the repository does not contain the true ones."""
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    monkeypatch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
    reference = FeatureExtractorInceptionV3("x", ["2048"])
    monkeypatch.undo()
    torch.save(reference.state_dict(), tmp_path / "inception.pth")
    extractor = extractors.load_extractor(f"inception:{tmp_path / 'inception.pth'}", torch.device("cpu"))
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(extractor.images(pixels), reference(pixels)[0]) and extractor.texts is None


def test_coco_end_to_end(run, tmp_path):
    status, stdout, stderr = run("--data", write_coco(tmp_path), "--count", 6, "--resolution", 96)
    assert status == 0, stderr
    assert "Pillow's Lanczos" in stdout and "resized to 96×96" in stdout and "captions_val2014.json" in stdout
    assert "R-precision" in json.loads((tmp_path / "out" / "evaluation.json").read_text())["generated images"]


def test_coco_draws_different_images_and_one_caption_of_each(tmp_path):
    source = coco.Coco(path := write_coco(tmp_path), None, 32, count=5, seed=3)
    batch = next(source.held_out_first())
    assert batch.images.shape == (6, 3, 32, 32) and len({path for path, _ in source.pairs}) == 6
    for image, caption in source.pairs:
        assert figures.caption(int(image.stem[-12:]), 99) in caption
        middle = Image.open(image).crop((16, 0, 80, 64)).resize((32, 32), Image.Resampling.LANCZOS)
        expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(coco.read_image(image, 32), expected, atol=1e-6, rtol=0)
    chosen = {image for seed in range(4) for image, _ in coco.Coco(path, None, 32, 1, seed).pairs}
    assert len(chosen) > 2  # two for each seed, and not the same ones


def test_mistakes_are_one_line(run, tmp_path):
    val = write_coco(tmp_path)
    (tmp_path / "train").mkdir()
    train = write_coco(tmp_path / "train", split="train2014")
    (tmp_path / "evaluation.json").write_text('{"mine": 1}')
    for arguments, says in (
        (("--data", train), "is not of COCO 2014 val"),
        (("--data", val, "--count", 7), "has 6 usable images"),
        (("--count", 4, "--out", tmp_path), "evaluation.json exists, and this command did not make it"),
        (("--data", val, "--count", 1), "need 4 images"),
        (("--data", val, "--count", 5, "--images", tmp_path / "nowhere"), "with --images"),
        (("--data", tmp_path / "evaluation.json"), "not a captions file in COCO's format"),
        (("--data", tmp_path / "none.json"), "cannot be read"),
        (("--data", val, "--count", 4, "--features", f"inception:{val}"), "weights are not available"),
        (("--count", 4, "--clip", "inception"), "cannot read text"),
    ):
        assert_one_line(run(*arguments), says)


def test_on_emoji_words_and_variety_are_measured_too(run, tmp_path, monkeypatch):
    """The real command on some of the emoji, at a lower output of the generator."""
    monkeypatch.setattr("data.emoji.SHARD", figures.few_emoji())
    status, stdout, stderr = run(*["--data", "emoji", "--count", "8", "--resolution", "16", "--truncation", "0.5"])
    assert status == 0, stderr
    for words in ("8 real ones", "FID", "precision", "R-precision", "R-precision of tags", "Variety", "4×4 grid"):
        assert words in stdout
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["variety"] > 0 and "FID to other real images" in written["generated images"]
    assert written["generated images"]["ψ"] == 0.5 and written["protocol"]["seed"] == 0


def test_enlarged_images_are_measured_too(run, tmp_path):
    """An untrained second stage interpolates."""
    path = tmp_path / "upsampler.safetensors"
    save_generator(path, *content(Upsampler(figures.LARGER.generator), load_clip("emoji"), 32, {}))
    status, stdout, stderr = run("--data", figures.folder(), "--count", 8, "--upsampler", path, "--resolution", 32)
    assert status == 0 and "enlarged by the second stage: ψ 1, FID" in stdout, stderr
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["generated images"].keys() == written["enlarged by the second stage"].keys()


def test_defaults_depend_on_the_data_and_the_run(tmp_path):
    counts = [evaluate.parse_args(["--data", data]).count for data in ("emoji", "folder")]
    assert counts == [2400, 1000] and evaluate.parse_args(["--data", "folder"]).clip == "judge"
    own = tmp_path / "clip.safetensors"
    own.touch()
    for name in (tmp_path, tmp_path / "generator_ema.safetensors"):
        assert evaluate.parse_args(["--data", "folder", "--checkpoint", str(name)]).clip == str(own)
