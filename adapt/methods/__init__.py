"""Fine-tuning methods: `registry.py` lists them all; `from_features/` and `in_backbone/` hold their models."""
