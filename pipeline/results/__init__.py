"""The table: its columns, its file, one row a seed."""
