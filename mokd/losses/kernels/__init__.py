"""What the fused prototype loss does to a block of logits, per device."""
