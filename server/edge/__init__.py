"""gRPC: a call is taken, checked once, and answered. Messages stop here."""
