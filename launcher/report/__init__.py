"""Runs as pages for people: the report of one or several runs, and the table of all."""
