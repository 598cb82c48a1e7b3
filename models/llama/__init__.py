"""Llama 2, 3, 3.1, 3.2 (dense)."""
