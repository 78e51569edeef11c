"""Circuits read from the weights: QK and OV products, composition, attention channels."""
