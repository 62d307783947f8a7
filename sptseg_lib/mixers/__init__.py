"""Token mixers and the networks built on them: maps are (B, C, h, w) throughout."""
