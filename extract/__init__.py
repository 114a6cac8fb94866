"""Stage one: source -> transform -> frozen backbone -> store."""
