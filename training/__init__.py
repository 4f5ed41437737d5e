"""The training of RealisID's weights, and the miniature world that it can be trained and measured on."""
