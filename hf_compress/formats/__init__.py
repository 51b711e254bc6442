"""What bytes on disk: one module per layout, each saying what it holds, how to write and how to read it."""
