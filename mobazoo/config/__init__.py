"""Recipes and per-layer rules as plain dataclasses; importing this needs no torch."""
