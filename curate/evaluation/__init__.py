"""Evaluation: what a judge thinks of an answer. No cluster."""
