"""`python -m launcher.cli` is `mokd`."""

from launcher.cli.start import main

main()
