"""The paper's tables and figures, ours beside theirs: `python -m vae_ood.reproduce` (the command is in __main__.py)."""
