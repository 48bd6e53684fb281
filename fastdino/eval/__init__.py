"""What a backbone is worth: k-NN accuracy, attention maps. Knows models and data, not training."""
