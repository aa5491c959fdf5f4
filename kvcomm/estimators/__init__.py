"""Estimators: the deviation of a text behind a new context, from anchors."""
