"""One score a row and column: higher = more of the trait. Knows models and concepts; no storage format, no cluster."""
