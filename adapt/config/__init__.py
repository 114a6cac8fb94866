"""Reads pipeline.yaml into checked, frozen objects."""
