"""Videos as samples: which frames, out of which file, decoded by processes that may hang or die."""
