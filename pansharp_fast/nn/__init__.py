"""Modules made of the operators."""
