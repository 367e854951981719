"""Records and numbers of pairs made visible."""
