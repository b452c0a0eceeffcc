"""The published networks and their presets."""
