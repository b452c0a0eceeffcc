"""One training loop and a recipe per model."""
