"""Decodes images strictly: a damaged file is an error, never an image with wrong pixels."""
