"""From a trained model to tokens."""
