"""What a target costs and keeps, measured on a few sequences, and the search for tau."""
