"""Equal work by third-party code; trainers run in a process of their own (`worker.py`)."""
