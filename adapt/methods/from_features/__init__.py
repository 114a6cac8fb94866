"""Methods that train from stored features and never run the backbone."""
