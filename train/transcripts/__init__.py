"""Transcripts as a classifier reads them: nucleotides, k-mers, reading frames, groups, and controls."""
