"""`python -m launcher.cli` is `mokd`."""

from launcher.cli.main import main

main()
