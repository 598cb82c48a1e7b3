"""As for the models."""

from tests.models.conftest import one_thread as one_thread
