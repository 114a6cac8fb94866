"""Lists samples and labels from folders, tables, tars, torchvision or a user's own datasets."""
