"""The size of the vision transformers in tests, as keyword arguments of timm."""

TINY = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 8}
