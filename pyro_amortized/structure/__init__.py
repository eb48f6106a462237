"""What does the model look like in this call? The only room that reads Pyro traces."""
