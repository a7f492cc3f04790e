"""Peak memory of a training job, before anything is loaded."""
