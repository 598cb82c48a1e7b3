from tests.eval.conftest import plain, texts, zoo

__all__ = ["plain", "texts", "zoo"]
