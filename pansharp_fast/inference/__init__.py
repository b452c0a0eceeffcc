"""Sharpening of arrays and whole scenes."""
