"""Building blocks that the model families share. Parameter names equal Hugging Face's."""
