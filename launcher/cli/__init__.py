"""The command line `mokd`."""
