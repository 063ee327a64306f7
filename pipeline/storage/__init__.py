"""Folders and object stores, and one driver a record."""
