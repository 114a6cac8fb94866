"""Methods that train inside a copy of the backbone, end to end."""
