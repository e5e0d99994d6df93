"""First weights of branches: read from what exists, fitted, recorded in the run, put into networks."""
