"""Pure functions on scores, counts and biases: how experts are kept equally busy."""
