"""Between processes: a server that owns the KV of a host, and the client that makes it an engine's store."""
