"""CLIP's tokenizer as open_clip has it, without the rest of open_clip, whose imports take two seconds."""

import functools
import importlib.util
from pathlib import Path


@functools.cache
def _module():
    """open_clip.tokenizer, from its file: an import by its name would import the whole package first."""
    (folder,) = importlib.util.find_spec("open_clip").submodule_search_locations
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", Path(folder, "tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_tokenizer(context_length):
    """A SimpleTokenizer of open_clip: texts → token ids [B, context_length]; it also has `encode` and `vocab_size`."""
    tokenizer = _module().SimpleTokenizer(context_length=context_length)
    # Training meets the same captions again and again. A GPU would wait while each is cleaned and split once more.
    tokenizer.encode = functools.lru_cache(2**16)(tokenizer.encode)
    return tokenizer
