"""Writing calls of a model down while they happen, for `kvcomm analyze` and `kvcomm replay` to read."""
