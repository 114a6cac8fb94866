"""Runs samples through a frozen backbone and writes its tokens to a store."""
