"""Checks of a call before anything is computed; each raises one error that says what to change."""
