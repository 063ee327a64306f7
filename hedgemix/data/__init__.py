"""Text in, tokens and bytes out."""
