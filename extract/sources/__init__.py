"""Samples and labels from folders, tables, tars, videos, torchvision or a user's own datasets."""
