"""Anchors: observed deviations of a segment's KV in a consumer's context. This version has none; nothing is exported."""
