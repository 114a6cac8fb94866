"""Decodes frames of videos in separate processes, so that no video can hang or crash the job."""
