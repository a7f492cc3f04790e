"""One file a command of the `vlmr1` command line."""
