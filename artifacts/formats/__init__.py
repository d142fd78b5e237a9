"""Readers of adapter files: one module per naming of keys, one table of them (`artifacts.formats.table`). No torch."""
