from tests.small import one_thread

__all__ = ["one_thread"]
