"""The fine-tuning methods: the table of all, the head that they share, and their models."""
