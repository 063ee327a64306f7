"""hedgemix: small language models whose score is a code length. The library; it never imports Ray."""

__version__ = "0.1.0"
