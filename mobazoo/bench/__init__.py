"""Timings: attention alone, decoding, prompts and sweeps, each against what a user would call instead."""
