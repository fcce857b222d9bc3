"""What the verbs `quality` and `speed` of `python -m tools.figures` measure, keep and draw."""
