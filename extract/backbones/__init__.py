"""Frozen vision transformers: finding and loading weights, preprocessing, tokens by layer."""
