"""Axis *architecture*: the mathematics of the model, in Flax NNX.

`shape.py` turns a candidate's choices into a `DecoderShape`, `decoder.py` runs it; `attention/<variant>.py`
and `feedforward/<variant>.py` hold what a layer can be made of, one file each.
"""
