"""Decodes images strictly: damaged files are errors, never wrong pixels."""
