from tests.helpers.api import tiny

__all__ = ["tiny"]
