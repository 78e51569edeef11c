"""Checks of a call before anything is computed.

Each raises one error that says what to change.
"""
