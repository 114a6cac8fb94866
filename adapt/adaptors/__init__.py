"""Saves and loads trained adaptors, and classifies new images and videos with them."""
