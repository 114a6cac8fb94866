"""Stage one: source -> frozen backbone -> store."""
