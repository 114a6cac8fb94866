"""Reads pipeline.yaml, or a study of several jobs, into checked, frozen objects."""
