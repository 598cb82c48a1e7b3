"""What a GPU says of this repository, and what arithmetic says before one is at hand."""
