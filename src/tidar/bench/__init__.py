"""How fast this machine is: the free-token-slots curve, and decoding speed against alternatives."""
