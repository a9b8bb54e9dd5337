"""Measures a model on rows: metrics, views, cost."""
