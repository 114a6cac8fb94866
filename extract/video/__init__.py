"""Decodes frames of videos in separate processes, which may hang or die without harm."""
