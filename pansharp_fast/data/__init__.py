"""Reading, simulating and describing image pairs."""
