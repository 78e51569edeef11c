"""Circuits in a model's weights: QK and OV products, composition, attention channels."""
