"""How a RealisID gets its weights: the miniature world it can be trained and measured on."""
