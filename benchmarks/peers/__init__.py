"""The same work done by other people's code."""
