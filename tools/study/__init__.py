"""Does MoBA learn? Several attentions trained on the same data, compared: ``python -m tools.study cpu``."""
