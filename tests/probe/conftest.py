from tests.eval.conftest import _one_thread, plain, texts, zoo

__all__ = ["_one_thread", "plain", "texts", "zoo"]
