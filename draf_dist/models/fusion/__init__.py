"""One fusion model a file."""
