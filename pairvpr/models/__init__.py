"""The network, with torch alone."""
