"""How unlike known data a datapoint looks to the encoder."""
