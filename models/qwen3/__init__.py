"""Qwen3 (dense): q and k normalised per head before RoPE."""
