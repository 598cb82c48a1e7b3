"""MoBA in models that are not ours."""
