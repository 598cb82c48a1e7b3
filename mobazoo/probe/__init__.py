"""What MoBA would do to a checkpoint that has full attention, measured before any training."""
