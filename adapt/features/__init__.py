"""Feature sources: stored tokens from memory or disk, tokens of the running backbone, or images."""
