"""What a candidate will cost on a target: features, a roofline, and a learned residual on top of it."""

from pathlib import Path

SHIPPED = Path(__file__).parent / "pretrained"
"""What was learnt before and ships: rates of whole candidates (`network.py`), operation models (`pretrained.py`)."""
