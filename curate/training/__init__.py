"""Training: fine-tuning on a curated set, and sweeps as tables of arms. No cluster."""
