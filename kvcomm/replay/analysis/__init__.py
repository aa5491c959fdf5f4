"""What of recorded prompts could be reused, and how: `kvcomm analyze`."""
