"""The small files that link the stages, and where every product stands."""
