"""Plain PyTorch, readable next to the equations: the oracle of every kernel and the last fallback."""
