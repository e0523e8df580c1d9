"""One self-contained HTML file a run: numbers, pictures, examples. Knows no model, no cluster, no corpus format."""
