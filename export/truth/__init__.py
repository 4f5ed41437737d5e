"""The judges of a build: the pictures that the equations give, and how far networks, plans and engine are from them."""
