"""The same work done by other people's code; trainers run in a process of their own (`worker.py`)."""
