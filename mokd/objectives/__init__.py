"""What branches learn from: networks, targets and losses of each objective."""
