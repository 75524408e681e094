"""Position encodings: a file for each of the four places, and schemes that combine places."""
