"""Training: what is trained and how it is stepped, as pure functions of arrays."""
