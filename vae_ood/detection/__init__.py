"""Every score against every outlier set: `python -m vae_ood.detection` (the command is in __main__.py)."""
