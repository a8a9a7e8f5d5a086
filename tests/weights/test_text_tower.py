"""The small text tower without open_clip's code computes what open_clip does, and saves its imports."""

import subprocess
import sys
from pathlib import Path

import torch

from clip import BUILT_IN, SMALL, FrozenClip, load_small
from weights.text_tower import TextTower


def test_it_reads_as_open_clip_does():
    theirs = load_small(BUILT_IN["small"])
    tower = TextTower(len(theirs.kept_ids) + 1, SMALL["embed_dim"], **SMALL["text_cfg"])
    state = theirs.model.state_dict()
    tower.load_state_dict({name: value for name, value in state.items() if not name.startswith("visual.")})
    ours = FrozenClip(tower, "small", theirs.kept_ids)
    ids = theirs.tokenize(["a red circle on a gray background", "", "unheard of"])
    expected = theirs.model.encode_text(ids, normalize=True)
    text = ours.encode_text(ids)
    torch.testing.assert_close(text.embedding, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(text.tokens, theirs.encode_text(ids).tokens, rtol=0, atol=1e-5)


def test_a_picture_of_our_own_model_imports_nothing_slow():
    code = (
        "import sys; from sampling.pipeline import Pipeline; Pipeline.load(device='cpu').sample('red heart')\n"
        "print({'torchvision', 'timm', 'open_clip', 'torch._dynamo', 'matplotlib'} & set(sys.modules))"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
