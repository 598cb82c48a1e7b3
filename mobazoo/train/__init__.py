"""Continue or begin the training of a zoo model."""
