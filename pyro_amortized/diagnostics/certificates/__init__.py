"""Posteriors with a certificate, datapoint by datapoint."""
