"""`kvcomm bench fidelity`: which way of reusing KV keeps the answers, and what it costs."""

__all__: list[str] = []
