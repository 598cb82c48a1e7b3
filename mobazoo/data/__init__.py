"""From documents to batches: reading, tokens, packed rows, collation."""
