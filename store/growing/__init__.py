"""Adds samples and layers to an existing store."""
