"""What a candidate will cost on a target: features, a roofline, and a learned residual on top of it."""
