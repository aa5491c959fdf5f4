"""A five-agent team answers three workloads, densely and with a shared KV-cache, on the same requests."""
