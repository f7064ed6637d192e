"""LoRA files: read, compared with a model, loaded as adapters or merged. `file` imports no torch."""
