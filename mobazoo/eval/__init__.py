"""What a checkpoint does on texts. A task is a module here: model, texts and its part of the recipe in, JSON out."""
