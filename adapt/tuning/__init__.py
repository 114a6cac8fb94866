"""Methods that train inside the backbone, end to end."""
