"""What belongs to one framework. Nothing here is imported by the rest of the package."""
