"""What can be wrong with a machine or a node, found before it costs a run: one small function per question."""
