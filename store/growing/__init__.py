"""Adds samples and layers to an existing store, while others may read it."""
