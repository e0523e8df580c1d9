"""curate: decide which training data a language model should see, by what each example does to its behaviour."""

__version__ = "0.1.0"
