"""What branches show while they learn: numbers over all ranks, and the alarms that follow from them."""
