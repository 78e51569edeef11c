"""Circuits in a model's weights: QK and OV, composition, attention channels."""
