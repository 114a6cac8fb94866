"""Finds weights that the model hub's client keeps on this machine; nothing is downloaded."""

from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from timm.models import get_arch_pretrained_cfgs

_FILES = ("model.safetensors", "pytorch_model.bin")


def cached_weights(name: str) -> list[Path]:
    """The weights of a timm model in the hub's cache: of one tag, or of all tags if the name has none."""
    architecture, _, tag = name.partition(".")
    found = list[Path]()
    for tagged, config in get_arch_pretrained_cfgs(architecture).items():
        if config.hf_hub_id and (not tag or tagged == name):
            paths = [try_to_load_from_cache(config.hf_hub_id, file) for file in _FILES]
            found.extend(Path(path) for path in paths if isinstance(path, str))
    return found
