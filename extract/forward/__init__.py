"""Runs the frozen backbone over batches of samples and encodes its tokens for the store."""
