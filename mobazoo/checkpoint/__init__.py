"""Checkpoint folders: reading them safely, loading, converting to MoBA and back, proving a conversion."""
