"""Methods that train from stored tokens and never run the backbone."""
