"""What the library is measured against: the same work in plain, idiomatic torch."""
