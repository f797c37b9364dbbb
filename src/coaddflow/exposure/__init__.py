"""The CCDs of an exposure together: scattered, solved as a whole, gathered."""
