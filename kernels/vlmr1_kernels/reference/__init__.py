"""Plain torch, on any device and in float64: the definition of every op."""
