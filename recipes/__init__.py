"""Recipes, installed as ``mobazoo.recipes``: data only, no code."""
