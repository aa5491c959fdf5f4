"""Codecs: how base KV and deviations are kept small."""
