from tests.eval.conftest import one_thread, plain, texts, zoo

__all__ = ["one_thread", "plain", "texts", "zoo"]
