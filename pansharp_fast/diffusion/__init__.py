"""Diffusion: schedules and samplers as far as a library does not give them."""
