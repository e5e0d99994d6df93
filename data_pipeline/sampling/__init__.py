"""Which images come in which order, and what is drawn for every view: pure functions of the seed."""
