"""Does MoBA learn? Several attentions trained on the same data, compared in one table: ``python -m tools.study cpu``."""
