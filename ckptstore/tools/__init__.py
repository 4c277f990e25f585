"""Tools over stores, as functions; the command line is thin above them."""
