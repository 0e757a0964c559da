"""Scripts that write files of the package."""
