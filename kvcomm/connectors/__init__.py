"""Ways for serving engines to share KV: one module per engine, everything bound to its version in one place."""
