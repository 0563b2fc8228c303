"""What models learn from: sources of examples, conversations as tokens, and batches of static shapes."""
