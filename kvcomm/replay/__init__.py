"""Recorded agent runs: reading, analysing, recording and replaying them."""
