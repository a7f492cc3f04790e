"""Progress lines and logs of a run, its curves, and HTML pages of runs, demos and evaluations."""
